"""A raw disk past the host's page cache (O_DIRECT, open(2)), by buffers in aligned memory.

What is not aligned as the disk wants it goes through the page cache after all: the kernel keeps both in step, for a
direct read writes cached changes back first, and a direct write drops what is cached.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Final

from asyncvmm.storage.image import Buffer
from asyncvmm.storage.raw import RawImage

_BOUNCE_BYTES: Final = 1 << 20
_ALIGNMENTS: Final = (512, 1024, 2048, 4096)


class DirectImage(RawImage):
    """``fd`` as RawImage has it. Raises OSError where the file system has no O_DIRECT."""

    def __init__(self, fd: int, size: int, *, start: int = 0) -> None:
        super().__init__(fd, size, start=start)
        self._can_read_now = False
        mode = os.O_RDONLY if _read_only(fd) else os.O_RDWR
        self._direct = os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT | os.O_CLOEXEC)
        self._bounce = mmap.mmap(-1, _BOUNCE_BYTES)
        self._room = memoryview(self._bounce)
        try:
            self._alignment = self._find_alignment()
        except OSError:
            self._close_direct()
            raise

    def _find_alignment(self) -> int:
        """The least that a read may be, tried out: nothing says it on every kernel."""
        for alignment in _ALIGNMENTS:
            try:
                os.preadv(self._direct, [self._room[:alignment]], self._start + alignment)
                return alignment
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        raise OSError(errno.EINVAL, "no direct I/O")

    def _fits(self, offset: int, size: int) -> bool:
        place = self._start + offset
        return not (place | size) % self._alignment and place + size <= self._end

    def read(self, offset: int, size: int) -> bytes | bytearray:
        """See Image."""
        if not self._fits(offset, size):
            return super().read(offset, size)
        data = bytearray(size)
        done = 0
        while done < size:
            room = self._room[: size - done]
            count = os.preadv(self._direct, [room], self._start + offset + done)
            if not count or count % self._alignment:
                data[done:] = super().read(offset + done, size - done)
                break
            data[done : done + count] = room[:count]
            done += count
        return data

    def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
        """See Image. Buffers that happen to be aligned are written from where they are."""
        flags = os.RWF_DSYNC if sync else 0
        size = sum(map(len, views))
        if not self._fits(offset, size):
            return self._write_to(self.fd, offset, views, flags)
        try:
            self._write_to(self._direct, offset, views, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_bounced(offset, views, flags)
        return None

    def _write_bounced(self, offset: int, views: Sequence[Buffer], flags: int) -> None:
        filled = 0
        for view in views:
            rest = memoryview(view)
            while rest:
                piece = rest[: _BOUNCE_BYTES - filled]
                self._room[filled : filled + len(piece)] = piece
                filled += len(piece)
                rest = rest[len(piece) :]
                if filled == _BOUNCE_BYTES:
                    self._write_to(self._direct, offset, [self._room], flags)
                    offset, filled = offset + filled, 0
        if filled:
            self._write_to(self._direct, offset, [self._room[:filled]], flags)

    def _close_direct(self) -> None:
        self._room.release()
        self._bounce.close()
        os.close(self._direct)
        self._direct = -1

    def close(self) -> None:
        """See Image."""
        if self._direct >= 0:
            self._close_direct()
        super().close()


def _read_only(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
