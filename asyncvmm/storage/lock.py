"""Advisory locks on disk images, as QEMU's file driver has them (block/file-posix.c): two bytes a permission.

The byte 100+n says "I use permission n", the byte 200+n says "nobody else may use it". Both are taken as shared locks;
who opens an image then looks whether anybody else has a byte that does not go together with its own. So an image has
one writer, or any number of readers, whichever of asyncvmm's machines or other QEMU programs they are.

The locks are of the open file description (fcntl(2), F_OFD_SETLK): closing it ends them, other closes do not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from asyncvmm.errors import DriveBusy

_USED: Final = 100
_REFUSED: Final = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3

_FLOCK = struct.Struct("hhqqi0q")
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks say; images on them go unlocked, as they do with QEMU."""


def lock_image(fd: int, path: Path, *, writer: bool) -> None:
    """Say that ``fd`` uses the image: as its only writer, or as one of its readers. Raises DriveBusy."""
    used = (_CONSISTENT_READ, _WRITE) if writer else (_CONSISTENT_READ,)
    refused = (_WRITE, _RESIZE)
    try:
        _take(fd, [*(_USED + n for n in used), *(_REFUSED + n for n in refused)])
        free = not _taken(fd, [*(_REFUSED + n for n in used), *(_USED + n for n in refused)])
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        raise
    if not free:
        unlock_image(fd)
        raise DriveBusy("drive", expected=_expected(writer), found=f"{path} in use")


def unlock_image(fd: int) -> None:
    """Give every lock of ``fd`` back."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _expected(writer: bool) -> str:
    return "an image nobody else uses, to write it" if writer else "an image nobody writes"


def _take(fd: int, places: Iterable[int]) -> None:
    for place in places:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, place, 1, 0))


def _taken(fd: int, places: Iterable[int]) -> bool:
    """Whether anybody else has one of them."""
    for place in places:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return True
    return False
