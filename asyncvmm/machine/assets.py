"""The files a guest boots from, the same for every machine: opened, checked, read. Blocking.

Files are read rather than mapped: a file that shrinks under a mapping would kill this process with SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import ExitStack
from pathlib import Path

from asyncvmm.errors import ConfigError, InitrdError, KernelError, MemorySizeError
from asyncvmm.machine.base import BootPlan
from asyncvmm.x86.kernel import check_kernel_head
from asyncvmm.x86.load import plan_boot

MOST_FILE_BYTES = 1 << 32
"""A kernel or initrd beyond 4 GiB cannot be loaded below the 32-bit hole; it is refused before it is read."""

HEAD_BYTES = 4096
"""Where every header that says what a kernel is has its place."""

PIECE_BYTES = 1 << 20
"""Bytes read in one go."""


def check_bootable(plan: BootPlan) -> None:
    """Refuse what cannot be booted, by the rules of our own loader, with nothing started.

    Raises KernelError, InitrdError, CmdlineError, MemorySizeError, VcpuCountError.
    """
    memory_bytes = plan.memory_mib << 20
    check_host_memory(memory_bytes)
    with ExitStack() as files:
        kernel = read_kernel(plan.kernel)
        size = initrd_bytes(plan, open_initrd(plan.initrd, files)[1])
        plan_boot(kernel, size, plan.cmdline, memory_bytes, plan.vcpus)


def host_memory() -> int:
    """The host's physical memory, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_host_memory(memory_bytes: int) -> None:
    """Refuse a guest larger than the host. Raises MemorySizeError."""
    host = host_memory()
    if memory_bytes > host:
        raise MemorySizeError(
            "guest memory", expected=f"at most the host's {host >> 20} MiB", found=f"{memory_bytes >> 20} MiB"
        )


def read_kernel(path: Path) -> memoryview:
    """The whole kernel file, if its beginning is a kernel's. Raises KernelError."""
    with ExitStack() as files:
        fd, size = _open_regular(path, KernelError, "kernel", files)
        try:
            check_kernel_head(os.pread(fd, HEAD_BYTES, 0))
            return _read_all(fd, size)
        except OSError as failure:
            raise KernelError("kernel", expected="a readable file", found=f"{path} ({failure.strerror})") from None


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


def _read_all(fd: int, size: int) -> memoryview:
    """Read in pieces, into one mapping: neither a second copy, nor the GIL held for all of it."""
    view, done = memoryview(mmap.mmap(-1, size)), 0
    while done < size and (got := os.preadv(fd, [view[done : done + PIECE_BYTES]], done)):
        done += got
    return view[:done]


def initrd_bytes(plan: BootPlan, initrd_size: int) -> int:
    """Size of the initrd with the appended archive behind it."""
    return padded(initrd_size) + len(plan.appended)


def padded(size: int) -> int:
    """An appended cpio archive starts on a 4-byte boundary (Linux, early-userspace buffer format)."""
    return -(-size // 4) * 4
