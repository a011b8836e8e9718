"""A set of a guest's pages, and the bitmaps it is made of. Offsets and sizes are bytes of guest memory, whole pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run, runs_of

_BITS: Final = re.compile(rb"\xff+|[^\x00]")
_NOT_ZERO: Final = bytes([0, *[1] * 255])
_ONES: Final = re.compile(rb"\x01+")
_EXPANDED: Final = [bytes(number >> bit & 1 for bit in range(8)) for number in range(256)]


class PageSet:
    """Pages of a memory of ``size`` bytes. A byte for each: a bitmap would be smaller, but slow to look at."""

    __slots__ = ("_marks",)

    def __init__(self, size: int) -> None:
        self._marks = bytearray(size // PAGE_BYTES)

    def add(self, offset: int, size: int) -> None:
        """Take in every page that these bytes touch. Not beyond the memory: the caller has checked that."""
        first, last = offset // PAGE_BYTES, -(-(offset + size) // PAGE_BYTES)
        if last - first == 1 and size:
            self._marks[first] = 1
        elif size:
            self._marks[first:last] = b"\1" * (last - first)

    def add_runs(self, runs: Iterable[Run]) -> None:
        """Take in runs."""
        for offset, size in runs:
            self.add(offset, size)

    def add_bits(self, bitmap: bytes | bytearray, offset: int, size: int) -> None:
        """Take in the pages whose bits are set, lowest first, of a bitmap of the ``size`` bytes from ``offset`` on."""
        for start, end in _not_zero(bitmap):
            for match in _BITS.finditer(bitmap, start, end):
                self._add_byte_or_ones(match, offset // PAGE_BYTES, size // PAGE_BYTES)

    def _add_byte_or_ones(self, match: re.Match[bytes], first: int, pages: int) -> None:
        at, count = 8 * match.start(), 8 * (match.end() - match.start())
        for place, bit in enumerate(_EXPANDED[match[0][0]] if count == 8 else ()):
            if bit and at + place < pages:
                self._marks[first + at + place] = 1
        if count > 8:
            count = min(count, pages - at)
            self._marks[first + at : first + at + count] = b"\1" * count

    def add_numbers(self, numbers: Iterable[int]) -> None:
        """Take in pages by number, counted from 0. Not beyond the memory: the caller has checked that."""
        marks = self._marks
        for number in numbers:
            marks[number] = 1

    def add_marks(self, marks: bytes, offset: int) -> None:
        """Take in the pages from ``offset`` on whose byte is 1; other bytes are 0."""
        self.add_runs((offset + start, size) for start, size in runs_of(marks, 1))

    def update(self, other: PageSet) -> None:
        """Take in another set of the same memory."""
        self.add_runs(other.runs())

    def runs(self) -> list[Run]:
        """All of it, ascending, apart from each other."""
        return list(runs_of(self._marks, 1))

    def __len__(self) -> int:
        return self._marks.count(1)

    def take(self) -> list[Run]:
        """All of it, which is none then. Not while another thread may add."""
        runs = self.runs()
        for offset, size in runs:
            self._marks[offset // PAGE_BYTES : (offset + size) // PAGE_BYTES] = bytes(size // PAGE_BYTES)
        return runs


def _not_zero(bitmap: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where the bytes that are not 0 begin and end. Most of a large memory is not written to between two looks, and an
    expression takes 50 times as long over zeros as these two."""
    marks = bitmap.translate(_NOT_ZERO)
    start = marks.find(1)
    while start >= 0 and (match := _ONES.match(marks, start)):
        yield start, match.end()
        start = marks.find(1, match.end())


def total(runs: Iterable[Run]) -> int:
    """Bytes in them."""
    return sum(size for _, size in runs)


def joined(runs: Sequence[Run], gap: int) -> list[Run]:
    """The runs, ascending, with those closer than ``gap`` bytes made one."""
    found: list[Run] = []
    for offset, size in runs:
        if found and offset - (found[-1][0] + found[-1][1]) <= gap:
            found[-1] = (found[-1][0], offset + size - found[-1][0])
        else:
            found.append((offset, size))
    return found
