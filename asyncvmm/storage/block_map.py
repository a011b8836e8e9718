"""Which blocks of an overlay are its own: one byte a block, 0 for the base's and 1 for the overlay's.

A byte rather than a bit, since bytes can be searched and set by the range without a loop in Python; the map of a disk
of 1 GiB has 256 KiB, and memory is taken only for the parts that are used.

Bytes only ever turn from 0 to 1. So a map on disk that is half the old one and half the new, after a crash amid saving
it, is right as well, if the blocks themselves were on stable storage before.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Final

from asyncvmm.errors import ImageError

LEAST_BLOCK: Final = 4096
"""The block of file systems, which guests align to: a smaller write than a block must copy the rest of it first."""

MOST_BLOCKS: Final = 1 << 22
"""Blocks of a map: 16 GiB in blocks of 4 KiB. Larger disks have larger blocks."""

_PAGE: Final = 4096
_BASE, _OWN = b"\0", b"\1"


def block_size_for(size: int) -> int:
    """The block size for a disk of ``size`` bytes."""
    block = LEAST_BLOCK
    while size > block * MOST_BLOCKS:
        block *= 2
    return block


def map_bytes(size: int, block: int) -> int:
    """Bytes of the map of a disk of ``size`` bytes, in whole pages."""
    return max(1, -(-size // block // _PAGE)) * _PAGE


class BlockMap:
    """The map of a disk of ``size`` bytes in blocks of ``block``. One thread marks, any may look."""

    def __init__(self, size: int, block: int) -> None:
        self.block = block
        self._size = size
        self._marks = mmap.mmap(-1, map_bytes(size, block))
        self._unsaved: set[int] = set()

    def is_own(self, index: int) -> bool:
        """Whether block ``index`` is the overlay's."""
        return bool(self._marks[index])

    def runs(self, offset: int, size: int) -> Iterator[tuple[bool, int, int]]:
        """The range in pieces that are the overlay's (True) or the base's: each with its offset and size."""
        end = offset + size
        while offset < end:
            index = offset // self.block
            own = self._marks[index]
            found = self._marks.find(_BASE if own else _OWN, index, -(-end // self.block))
            stop = end if found < 0 else min(end, found * self.block)
            yield bool(own), offset, stop - offset
            offset = stop

    def mark(self, first: int, last: int) -> None:
        """Blocks ``first`` to ``last``, both included, are the overlay's from now on."""
        if self._marks.find(_BASE, first, last + 1) < 0:
            return
        self._marks[first : last + 1] = _OWN * (last + 1 - first)
        self._unsaved.update(range(first // _PAGE, last // _PAGE + 1))

    def save(self, fd: int, place: int) -> bool:
        """Write what was marked since the last time; False if that is nothing. Raises OSError."""
        pages = sorted(self._unsaved)
        for page in pages:
            os.pwrite(fd, self._marks[page * _PAGE : (page + 1) * _PAGE], place + page * _PAGE)
            self._unsaved.discard(page)
        return bool(pages)

    def load(self, fd: int, place: int) -> None:
        """Take the map from a file. Raises ImageError for one that is none, OSError."""
        for start, end in _filled(fd, place, place + len(self._marks)):
            data = os.pread(fd, end - start, start)
            if len(data) != end - start or data.strip(b"\0\1"):
                raise ImageError("overlay", expected="a map of zeroes and ones", found="something else")
            self._marks[start - place : end - place] = data

    def close(self) -> None:
        """Give the memory back."""
        self._marks.close()


def _filled(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, from ``start`` to ``end``, in whole pages."""
    while start < end:
        try:
            start = max(start, os.lseek(fd, start, os.SEEK_DATA) // _PAGE * _PAGE)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        if start >= end:
            return
        stop = min(end, -(-os.lseek(fd, start, os.SEEK_HOLE) // _PAGE) * _PAGE)
        yield start, stop
        start = stop
