"""A disk whose bytes are those of a file or a block device, through the host's page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from asyncvmm.storage.image import SECTOR, Buffer, whole_sectors
from asyncvmm.storage.ranges import discard_device, is_device, punch_hole, zero_range

MOST_VIEWS: Final = 1024
"""Buffers one system call takes (IOV_MAX)."""

_ZEROES: Final = bytes(1 << 20)
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY)


class RawImage:
    """``fd`` is the image's from now on. start: where in the file the disk begins. size: its bytes in the file.

    A read within the last sector of a file that ends in it gives zeroes; one beyond the end of a file that became
    shorter is an error.
    """

    def __init__(self, fd: int, size: int, *, start: int = 0) -> None:
        self.size = whole_sectors(size)
        self.fd = fd
        self._start = start
        self._end = start + size
        self._device = is_device(fd)
        self._can_read_now = size % SECTOR == 0

    def read(self, offset: int, size: int) -> bytes | bytearray:
        """See Image."""
        data = os.pread(self.fd, size, self._start + offset)
        return data if len(data) == size else self._read_rest(bytearray(data), offset, size)

    def _read_rest(self, data: bytearray, offset: int, size: int) -> bytearray:
        while len(data) < size:
            place = self._start + offset + len(data)
            piece = os.pread(self.fd, size - len(data), place)
            if not piece and place < self._end:
                raise OSError(errno.EIO, "the image became shorter")
            data += piece or bytes(size - len(data))
        return data

    def read_now(self, offset: int, views: Sequence[memoryview]) -> bool:
        """See Image: what is in the page cache."""
        if not self._can_read_now or len(views) > MOST_VIEWS:
            return False
        try:
            done = os.preadv(self.fd, views, self._start + offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            self._can_read_now = error.errno not in _UNSUPPORTED
            return False
        return done == sum(map(len, views))

    def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
        """See Image."""
        self._write_to(self.fd, offset, views, os.RWF_DSYNC if sync else 0)

    def _write_to(self, fd: int, offset: int, views: Sequence[Buffer], flags: int) -> None:
        left, size = views, len(views[0]) if len(views) == 1 else sum(map(len, views))
        place = self._start + offset
        while left:
            done = os.pwritev(fd, left if len(left) <= MOST_VIEWS else left[:MOST_VIEWS], place, flags)
            if done == size:  # as a rule: no need to look at the buffers again
                break
            if not done:
                raise OSError(errno.EIO, "nothing was written")
            place, size = place + done, size - done
            left = behind(left, done)

    def discard(self, offset: int, size: int) -> None:
        """See Image."""
        try:
            (discard_device if self._device else punch_hole)(self.fd, self._start + offset, size)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """See Image."""
        for change in (punch_hole, zero_range) if unmap else (zero_range,):
            try:
                return change(self.fd, self._start + offset, size)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        while size > 0:
            piece = memoryview(_ZEROES)[:size]
            self.write(offset, [piece])
            offset += len(piece)
            size -= len(piece)
        return None

    def flush(self) -> None:
        """See Image."""
        os.fdatasync(self.fd)

    def settle(self) -> None:
        """See Image. Nothing of it is anywhere else."""

    def close(self) -> None:
        """See Image."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def behind(views: Sequence[Buffer], done: int) -> Sequence[Buffer]:
    """What is left of ``views`` behind their first ``done`` bytes."""
    for index, view in enumerate(views):
        if done < len(view):
            return [memoryview(view)[done:], *views[index + 1 :]]
        done -= len(view)
    return ()
