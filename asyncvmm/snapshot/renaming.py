"""renameat2(2), which says what is to happen to what is at the new name."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from typing import Any

# linux/fs.h
_NOREPLACE, _EXCHANGE = 1, 2

_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What a C library, a kernel or a file system without it says."""


def rename_to_nothing(directory: int, old: str, new: str) -> None:
    """Rename a directory to a name at which nothing is. Raises OSError, FileExistsError if something is.

    Where the file system does not have that, a directory that is made there at the same moment and is empty is lost.
    """
    try:
        _rename(directory, old, new, _NOREPLACE)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if new in os.listdir(directory):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def exchange(directory: int, one: str, other: str) -> None:
    """Let two names change places, at once. Raises OSError, EINVAL where the file system does not have that."""
    _rename(directory, one, other, _EXCHANGE)


def _rename(directory: int, old: str, new: str, flags: int) -> None:
    if _renameat2()(directory, os.fsencode(old), directory, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int]:
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return _missing
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]


def _missing(*_: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1
