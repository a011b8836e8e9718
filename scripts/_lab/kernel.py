"""The outer kernel with its small initramfs: the distribution's cloud kernel, busybox, and the modules to reach disks.

Fetched once and kept: a later run asks no package server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import attrs

from _lab.files import publish_directory, remove_others, scratch_directory
from asyncvmm.errors import ImageError
from asyncvmm.guest import cpio
from asyncvmm.guest.apt import Apt, first_dependency, unpacked
from asyncvmm.guest.modules import Module, collect_modules
from asyncvmm.guest.sources import KERNEL_PACKAGE, find_busybox

INIT = Path(__file__).with_name("init.sh")
MODULES = ("virtio_pci", "virtio_blk", "overlay", "virtio_console", "kvm_amd", "tun", "vhost_vsock")


@attrs.frozen
class OuterKernel:
    """The kernel to boot and its initramfs."""

    kernel: Path
    initrd: Path


def outer_kernel(cache: Path, report: Callable[[str], None]) -> OuterKernel:
    """The cached outer kernel; fetched and built first if it is not there. Raises ImageError."""
    inputs = INIT.read_bytes() + " ".join(MODULES).encode()
    directory = cache / f"kernel-{hashlib.sha256(inputs).hexdigest()[:16]}"
    if not directory.exists():
        with scratch_directory(cache) as scratch:
            _build(directory, scratch, report)
        remove_others(directory, "kernel-*")
    return OuterKernel(directory / "vmlinuz", directory / "initrd")


def _build(directory: Path, scratch: Path, report: Callable[[str], None]) -> None:
    apt = Apt(scratch, report)
    busybox = find_busybox(apt)
    meta = apt.find(KERNEL_PACKAGE)
    name = first_dependency(meta, "linux-image-") if meta else None
    package = apt.find(name) if name else None
    if package is None:
        raise ImageError("kernel package", expected=KERNEL_PACKAGE, found="none")
    with unpacked(apt.download(package)) as root, publish_directory(directory) as aside:
        kernel = next((root / "boot").glob("vmlinuz-*"))
        modules = collect_modules(root / "lib" / "modules", [(module, "") for module in MODULES])
        (aside / "vmlinuz").write_bytes(kernel.read_bytes())
        (aside / "initrd").write_bytes(_initramfs(busybox.data, modules))


def _initramfs(busybox: bytes, modules: list[Module]) -> bytes:
    order = "".join(f"{module.file}\n" for module in modules)
    return cpio.write(
        [
            *(cpio.directory(name) for name in ("dev", "proc", "sys", "system", "project", "upper", "root")),
            cpio.character_device("dev/console", 5, 1),
            cpio.file("init", INIT.read_bytes(), 0o755),
            cpio.file("bin/busybox", busybox, 0o755),
            cpio.file("modules/order", order.encode()),
            *(cpio.file(f"modules/{module.file}", module.data) for module in modules),
        ]
    )
