"""The files a guest boots from: checked before QEMU is started, and joined in memory where there are two archives."""

from __future__ import annotations

import os
from pathlib import Path

from asyncvmm.errors import ConfigError, InitrdError, KernelError
from asyncvmm.machine.base import BootPlan

ARCHIVE_ALIGNMENT = 4
"""Linux looks for a second cpio archive on such a boundary (Documentation/driver-api/early-userspace/buffer-format)."""

_CHUNK = 1 << 20


def check_readable(plan: BootPlan) -> None:
    """Blocking. Raises KernelError or InitrdError for a file that is missing, unreadable or no regular file."""
    _check("kernel", plan.kernel, KernelError)
    if plan.initrd is not None:
        _check("initrd", plan.initrd, InitrdError)


def join_initrd(plan: BootPlan) -> int:
    """A memfd with the initrd and the appended archive behind it; the caller closes it. Blocking.

    Raises InitrdError.
    """
    memory = os.memfd_create("initrd")
    try:
        if plan.initrd is not None:
            _copy(plan.initrd, memory)
        os.lseek(memory, -os.lseek(memory, 0, os.SEEK_END) % ARCHIVE_ALIGNMENT, os.SEEK_END)
        _write(memory, plan.appended)
    except OSError as error:
        os.close(memory)
        raise InitrdError(f"initrd {plan.initrd}", expected="a file and memory to join it in", found=error) from error
    return memory


def _check(what: str, path: Path, kind: type[ConfigError]) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        found = os.strerror(error.errno or 0)
        raise kind(f"{what} {path}", expected="a readable file", found=found) from error


def _copy(path: Path, target: int) -> None:
    with path.open("rb") as source:
        while os.sendfile(target, source.fileno(), None, _CHUNK):
            pass


def _write(target: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]
