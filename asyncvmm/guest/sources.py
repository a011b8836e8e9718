"""Where an image's ingredients come from: the distribution's packages, else the host's own files, else the caller's.

Each source has a cheap ``identity`` (what the image's cache key is made of) and gives its bytes only when asked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.guest.apt import Apt, Package, first_dependency, run, unpacked
from asyncvmm.guest.kernel import read_kernel
from asyncvmm.guest.modules import Module, collect_modules
from asyncvmm.guest.store import sha256

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
_CONCRETE_PREFIX = "linux-image-"


@attrs.frozen
class KernelFiles:
    """A kernel and the modules to ship with it."""

    kernel: bytes
    modules: list[Module]


@attrs.frozen
class KernelSource:
    """A kernel to be had. ``identity`` goes into the manifest; ``load`` gives the files."""

    identity: dict[str, str]
    load: Callable[[], KernelFiles]


@attrs.frozen
class Busybox:
    """A static busybox: its bytes, its applets' paths, and where it came from."""

    identity: dict[str, str]
    data: bytes = attrs.field(repr=False)
    applets: list[str] = attrs.field(repr=False)


def has_apt() -> bool:
    """Whether packages can be fetched and unpacked here."""
    return all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))


def given_kernel(kernel: Path, modules: Path | None) -> KernelSource:
    """The caller's kernel file, and the modules under a directory if one is given. Raises KernelError, ImageError."""
    files = KernelFiles(read_kernel(kernel), collect_modules(modules) if modules else [])
    identity = {"source": "file", "sha256": sha256(files.kernel), "modules_sha256": _modules_hash(files.modules)}
    return KernelSource(identity, lambda: files)


def default_kernel(apt: Apt | None, report: Callable[[str], None]) -> KernelSource:
    """The distribution's cloud kernel, else, with a word to ``report``, the host's own.

    Raises ImageError naming all that was tried.
    """
    tried = []
    attempts: tuple[Callable[[], KernelSource], ...] = (lambda: _packaged_kernel(apt), _host_kernel)
    for attempt in attempts:
        try:
            return attempt()
        except ImageError as error:
            tried.append(str(error))
            report(str(error))
    raise ImageError("no kernel for the image", expected="apt, or a readable host kernel", found="; ".join(tried))


def _packaged_kernel(apt: Apt | None) -> KernelSource:
    if apt is None:
        raise ImageError("kernel package", expected="apt-get, apt-cache and dpkg-deb", found="not all of them")
    meta = apt.find(KERNEL_PACKAGE)
    concrete = first_dependency(meta, _CONCRETE_PREFIX) if meta else None
    package = apt.find(concrete) if concrete else None
    if package is None:
        raise ImageError("kernel package", expected=f"{KERNEL_PACKAGE} in the package lists", found=concrete or "none")
    identity = {"source": "package", "package": package.name, "version": package.version, "sha256": package.sha256}
    return KernelSource(identity, lambda: _unpack_kernel(apt, package))


def _unpack_kernel(apt: Apt, package: Package) -> KernelFiles:
    with unpacked(apt.download(package)) as root:
        kernels = sorted((root / "boot").glob("vmlinuz-*"))
        if len(kernels) != 1:
            raise ImageError(f"package {package.name}", expected="one boot/vmlinuz-*", found=len(kernels))
        libraries = [root / "lib" / "modules", root / "usr" / "lib" / "modules"]
        modules = next((directory for directory in libraries if directory.is_dir()), None)
        return KernelFiles(read_kernel(kernels[0]), collect_modules(modules) if modules else [])


def _host_kernel() -> KernelSource:
    release = os.uname().release
    candidates = [Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")]
    kernel = next((path for path in candidates if os.access(path, os.R_OK)), None)
    if kernel is None:
        raise ImageError("host kernel", expected=" or ".join(map(str, candidates)), found="none readable")
    modules = Path(f"/lib/modules/{release}")
    return given_kernel(kernel, modules if modules.is_dir() else None)


def _modules_hash(modules: list[Module]) -> str:
    return sha256("".join(f"{m.file} {m.need} {sha256(m.data)}\n" for m in modules).encode())


def find_busybox(apt: Apt | None) -> Busybox:
    """The host's busybox if it is static, else the distribution's busybox-static. Raises ImageError."""
    for path in (Path("/bin/busybox"), Path("/usr/bin/busybox")):
        if os.access(path, os.R_OK | os.X_OK) and is_static(path.read_bytes()):
            return _busybox({"source": "host"}, path)
    package = apt.find(BUSYBOX_PACKAGE) if apt else None
    if apt is None or package is None:
        raise ImageError("no static busybox", expected=f"/bin/busybox, or apt to fetch {BUSYBOX_PACKAGE}", found="none")
    with unpacked(apt.download(package)) as root, _program(root) as path:
        return _busybox({"source": "package", "package": package.name, "version": package.version}, path)


@contextmanager
def _program(root: Path) -> Iterator[Path]:
    paths = [path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.is_file()]
    if not paths:
        raise ImageError(BUSYBOX_PACKAGE, expected="bin/busybox in it", found="none")
    yield paths[0]


def _busybox(identity: dict[str, str], path: Path) -> Busybox:
    data = path.read_bytes()
    applets = run([str(path), "--list-full"], path.parent).split()
    return Busybox({**identity, "sha256": sha256(data)}, data, applets)


def is_static(program: bytes) -> bool:
    """Whether these bytes are an x86-64 ELF program without an interpreter (no PT_INTERP among its headers)."""
    if program[:6] != b"\x7fELF\x02\x01" or len(program) < 64 or program[18:20] != b"\x3e\0":
        return False
    table = int.from_bytes(program[0x20:0x28], "little")  # e_phoff
    size = int.from_bytes(program[0x36:0x38], "little")  # e_phentsize
    count = int.from_bytes(program[0x38:0x3A], "little")  # e_phnum
    kinds = {program[table + index * size :][:4] for index in range(count)}
    return (3).to_bytes(4, "little") not in kinds
