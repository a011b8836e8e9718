"""Ranges of files and block devices: holes, zeroes, clones, sizes (fallocate(2), ioctl_ficlone(2), linux/fs.h)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from typing import Final

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

BLKGETSIZE64: Final = 0x80081272
BLKDISCARD: Final = 0x1277
FICLONE: Final = 0x40049409

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _change(fd: int, mode: int, offset: int, size: int) -> None:
    if _fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, size):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Free the range; it reads as zeroes. Raises OSError."""
    _change(fd, FALLOC_FL_PUNCH_HOLE, offset, size)


def zero_range(fd: int, offset: int, size: int) -> None:
    """Make the range read as zeroes, keeping its space. Raises OSError."""
    _change(fd, FALLOC_FL_ZERO_RANGE, offset, size)


def discard_device(fd: int, offset: int, size: int) -> None:
    """Tell a block device that nobody wants that range any more. Raises OSError."""
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", offset, size))


def clone_file(source: int, target: int) -> None:
    """Let ``target`` share all of ``source``'s blocks, copied when written. Raises OSError where that cannot be."""
    fcntl.ioctl(target, FICLONE, source)


def is_device(fd: int) -> bool:
    """Whether it is a block device."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def size_of(fd: int) -> int:
    """Bytes of a file or a block device."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    size: int = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
    return size
