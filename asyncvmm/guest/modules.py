"""Which kernel modules a guest image ships, and the order in which PID 1 loads them.

Only drivers of virtio devices and the file systems that live on them: a boot without such a device loads none, and a
file system only the root that is made of it.
Dependencies are read from the modules themselves, for a distribution's package comes without modules.dep.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.guest.modinfo import parse_modinfo

WANTED: tuple[tuple[str, str], ...] = (
    ("virtio_mmio", "mmio"),
    ("virtio_pci", "pci"),
    ("virtio_blk", "2"),
    ("virtio_net", "1"),
    ("virtio_console", "3"),
    ("virtio_rng", "4"),
    ("virtio_balloon", "5"),
    ("vmw_vsock_virtio_transport", "19"),
    ("ext4", "ext4"),
    ("squashfs", "squashfs"),
    ("erofs", "erofs"),
    ("overlay", "overlay"),
)
"""Module and what it is loaded for: a transport, the id of a virtio device (virtio 1.2, section 5), or a file system
that the root is made of. What is built into a kernel, or not there at all, is left out."""

TRANSPORTS = ("mmio", "pci")
"""They come first: without one there is no device."""

MAX_MODULE = 64 * 1024 * 1024
"""Most bytes of one module, unpacked."""


@attrs.frozen
class Module:
    """One module as shipped: ``file`` is its name in the image, ``need`` what it is loaded for, as in ``WANTED``."""

    name: str
    file: str
    need: str
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")


def collect_modules(directory: Path, wanted: Sequence[tuple[str, str]] = WANTED) -> list[Module]:
    """The wanted modules found anywhere under ``directory``, each behind what it depends on.

    Raises ImageError if the directory or a module cannot be read.
    """
    if not directory.is_dir():
        raise ImageError("kernel modules", expected="a directory", found=str(directory))
    paths = {_name(path): path for path in sorted(directory.rglob("*.ko*")) if path.is_file()}
    cache: dict[str, Module] = {}
    modules: dict[tuple[str, str], Module] = {}
    for name, need in wanted:
        for module in _with_dependencies(name, need, paths, cache, ()):
            if not (need.isdigit() and _is_part_of_every_transport(module.name, modules)):
                modules.setdefault((module.name, need), module)
    return list(modules.values())


def _is_part_of_every_transport(name: str, modules: Mapping[tuple[str, str], Module]) -> bool:
    """Then it is loaded already when there is a device to load a driver for."""
    transports = {need for _, need in modules if need in TRANSPORTS}
    return bool(transports) and all((name, transport) in modules for transport in transports)


def modules_list(modules: list[Module]) -> str:
    """The content of /asyncvmm/modules.list: ``file need`` per line."""
    return "".join(f"{module.file} {module.need}\n" for module in modules)


def _with_dependencies(
    name: str, need: str, paths: dict[str, Path], cache: dict[str, Module], above: tuple[str, ...]
) -> Iterator[Module]:
    path = paths.get(name)
    if path is None:
        return
    if name in above:
        raise ImageError("kernel modules", expected="no circle of dependencies", found=" → ".join((*above, name)))
    if name not in cache:
        cache[name] = Module(name, f"{name}.ko", need, _read(path))
    module = cache[name]
    depends = parse_modinfo(module.data, str(path)).get("depends", "")
    for dependency in filter(None, depends.split(",")):
        yield from _with_dependencies(dependency.replace("-", "_"), need, paths, cache, (*above, name))
    yield attrs.evolve(module, need=need)


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
