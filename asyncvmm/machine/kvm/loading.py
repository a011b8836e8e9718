"""From a BootPlan to a VM that is ready to enter its kernel. Blocking; a worker thread's work.

Files are read and the whole layout is decided before /dev/kvm is opened: what cannot be booted is refused with nothing
started. Files are read rather than mapped: a file that shrinks under a mapping would kill this process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from asyncvmm.errors import ConfigError, InitrdError, KernelError, MemorySizeError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.memory import GuestMemory, host_memory
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout, plan_boot

MOST_FILE_BYTES = 1 << 32
"""A kernel or initrd beyond 4 GiB cannot be loaded below the 32-bit hole; it is refused before it is read."""


def load(plan: BootPlan, timeline: Timeline, adopt: Callable[[KvmVm], None]) -> None:
    """Build and load the VM. ``adopt`` takes it over as soon as it exists, so that the caller can free it.

    Raises KernelError, InitrdError, CmdlineError, MemorySizeError, VcpuCountError, HostError.
    """
    memory_bytes = plan.memory_mib << 20
    check_host_memory(memory_bytes)
    with ExitStack() as files:
        with timeline.phase("kernel_asset_read"):
            kernel = read_kernel(plan.kernel)
        with timeline.phase("rootfs_asset_open"):
            initrd, initrd_size = open_initrd(plan.initrd, files)
        total = _padded(initrd_size) + len(plan.appended)
        with timeline.phase("layout"):
            layout = plan_boot(kernel, total, plan.cmdline, memory_bytes, plan.vcpus)
        vm = KvmVm(memory_bytes, plan.vcpus, timeline)
        adopt(vm)
        with timeline.phase("rootfs_load"):
            _load_initrd(vm.memory, layout, initrd, initrd_size, plan.appended)
        with timeline.phase("kernel_load"):
            for segment in layout.segments:
                vm.memory.write(segment.address, segment.data)
        with timeline.phase("vcpu_config"):
            vm.configure(layout.cpu)


def check_host_memory(memory_bytes: int) -> None:
    """Refuse a guest larger than the host. Raises MemorySizeError."""
    host = host_memory()
    if memory_bytes > host:
        raise MemorySizeError(
            "guest memory", expected=f"at most the host's {host >> 20} MiB", found=f"{memory_bytes >> 20} MiB"
        )


def read_kernel(path: Path) -> bytes:
    """The whole kernel file. Raises KernelError."""
    with ExitStack() as files:
        fd, size = _open_regular(path, KernelError, "kernel", files)
        return _read_all(fd, size)


def open_initrd(path: Path | None, files: ExitStack) -> tuple[int, int]:
    """Descriptor and size of the initrd; -1 and 0 for none. Raises InitrdError."""
    return (-1, 0) if path is None else _open_regular(path, InitrdError, "initrd", files)


def _open_regular(path: Path, error: type[ConfigError], what: str, files: ExitStack) -> tuple[int, int]:
    expected = "a readable file"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(what, expected=expected, found=f"{path} ({reason})") from None
    files.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise error(what, expected="a regular file", found=f"{path} ({_kind(status.st_mode)})")
    if status.st_size > MOST_FILE_BYTES:
        raise error(what, expected=f"at most {MOST_FILE_BYTES} bytes", found=f"{path} ({status.st_size} bytes)")
    return fd, status.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a character device"}
    return kinds.get(stat.S_IFMT(mode), "not a file")


def _read_all(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (chunk := os.read(fd, size - len(data))):
        data += chunk
    return bytes(data)


def _padded(size: int) -> int:
    """An appended cpio archive starts on a 4-byte boundary (Linux, early-userspace buffer format)."""
    return -(-size // 4) * 4


def _load_initrd(memory: GuestMemory, layout: BootLayout, fd: int, size: int, appended: bytes) -> None:
    address = layout.initrd_address
    if address is None:
        return
    read = memory.read_file(address, fd, size) if size else 0
    if read != size:
        raise InitrdError("initrd", expected=f"{size} bytes, as when it was opened", found=f"{read} bytes")
    memory.write(address + _padded(size), appended)
