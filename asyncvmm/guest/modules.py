"""Which kernel modules a guest image ships, and the order in which PID 1 loads them.

Only drivers of virtio devices and the file systems that live on them: a boot without such a device loads none.
Dependencies are read from the modules themselves, for a distribution's package comes without modules.dep.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.guest.modinfo import parse_modinfo

WANTED: tuple[tuple[str, int | None], ...] = (
    ("virtio_mmio", None),
    ("virtio_blk", 2),
    ("overlay", 2),
    ("squashfs", 2),
    ("erofs", 2),
    ("virtio_net", 1),
    ("virtio_console", 3),
    ("virtio_rng", 4),
    ("virtio_balloon", 5),
    ("vmw_vsock_virtio_transport", 19),
)
"""Module and the virtio device id (virtio 1.2, section 5) for which it is loaded; None for the transport itself.
What is built into a kernel, or not there at all, is left out."""

MAX_MODULE = 64 * 1024 * 1024
"""Most bytes of one module, unpacked."""


@attrs.frozen
class Module:
    """One module as shipped: ``file`` is its name in the image, ``device`` as in ``WANTED``."""

    name: str
    file: str
    device: int | None
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")


def collect_modules(directory: Path, wanted: Sequence[tuple[str, int | None]] = WANTED) -> list[Module]:
    """The wanted modules found anywhere under ``directory``, each behind what it depends on.

    Raises ImageError if the directory or a module cannot be read.
    """
    if not directory.is_dir():
        raise ImageError("kernel modules", expected="a directory", found=str(directory))
    paths = {_name(path): path for path in sorted(directory.rglob("*.ko*")) if path.is_file()}
    cache: dict[str, Module] = {}
    modules: dict[tuple[str, int | None], Module] = {}
    for name, device in wanted:
        for module in _with_dependencies(name, device, paths, cache, ()):
            if (module.name, None) not in modules:
                modules.setdefault((module.name, device), module)
    return list(modules.values())


def modules_list(modules: list[Module]) -> str:
    """The content of /asyncvmm/modules.list: ``file`` or ``file device`` per line."""
    return "".join(f"{m.file}\n" if m.device is None else f"{m.file} {m.device}\n" for m in modules)


def _with_dependencies(
    name: str, device: int | None, paths: dict[str, Path], cache: dict[str, Module], above: tuple[str, ...]
) -> Iterator[Module]:
    path = paths.get(name)
    if path is None:
        return
    if name in above:
        raise ImageError("kernel modules", expected="no circle of dependencies", found=" → ".join((*above, name)))
    if name not in cache:
        cache[name] = Module(name, f"{name}.ko", None, _read(path))
    module = cache[name]
    depends = parse_modinfo(module.data, str(path)).get("depends", "")
    for dependency in filter(None, depends.split(",")):
        yield from _with_dependencies(dependency.replace("-", "_"), device, paths, cache, (*above, name))
    yield attrs.evolve(module, device=device)


def _name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _read(path: Path) -> bytes:
    try:
        data = _unpack(path)
    except (OSError, EOFError, lzma.LZMAError, subprocess.SubprocessError) as error:
        raise ImageError("kernel module", expected="a readable module", found=f"{path}: {error}") from error
    if len(data) > MAX_MODULE:
        raise ImageError("kernel module", expected=f"at most {MAX_MODULE} bytes", found=str(path))
    return data


def _unpack(path: Path) -> bytes:
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            return stream.read(MAX_MODULE + 1)
    if path.suffix == ".xz":
        with lzma.open(path) as stream:
            return stream.read(MAX_MODULE + 1)
    if path.suffix == ".zst":
        return _unpack_zstd(path)
    with path.open("rb") as stream:
        return stream.read(MAX_MODULE + 1)


def _unpack_zstd(path: Path) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise ImageError("kernel module", expected="zstd installed to unpack it", found=str(path))
    return subprocess.run([program, "-dcq", "--", path], check=True, capture_output=True, timeout=60).stdout
