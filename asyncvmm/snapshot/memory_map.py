"""MemoryMap: which parts of a guest's memory a snapshot's memory file holds, which are zeros, which are the base's.

An offset is the same in the file and in memory, where RAM regions lie back to back. What the file does not hold is a
hole in it: zeros in a full snapshot, the base's in one that is a difference.

As plain values, runs are numbers of pages by turns: a gap, a run, a gap, a run. So runs that overlap, or are out of
order, cannot be written down, and many of them are read quickly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from typing import Any

import attrs

from asyncvmm.errors import SnapshotDamaged

PAGE_BYTES = 4096

MOST_BYTES = 1 << 40
"""Of guest memory, as of any file of a snapshot."""

Run = tuple[int, int]
"""Offset and size in bytes, both whole pages."""

_SIZE = itemgetter(1)


@attrs.frozen(kw_only=True)
class MemoryMap:
    """size: bytes of guest memory. data: runs whose pages are in the file, ascending, apart from each other.

    zero: runs of a difference that have become zeros since its base; none in a full snapshot.
    """

    size: int
    data: tuple[Run, ...] = ()
    zero: tuple[Run, ...] = ()
    is_difference: bool = False

    @property
    def data_bytes(self) -> int:
        """Bytes that the file holds."""
        return sum(map(_SIZE, self.data))

    @property
    def zero_bytes(self) -> int:
        """Bytes that have become zeros since the base."""
        return sum(map(_SIZE, self.zero))

    def to_plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "size": self.size,
            "is_difference": self.is_difference,
            "data": runs_to_plain(self.data),
            "zero": runs_to_plain(self.zero),
        }

    @classmethod
    def from_plain(cls, plain: object) -> MemoryMap:
        """The map that ``to_plain`` wrote. Raises SnapshotDamaged."""
        if not isinstance(plain, dict) or plain.keys() != {"size", "is_difference", "data", "zero"}:
            raise SnapshotDamaged("memory map", expected="size, is_difference, data and zero", found=_shown(plain))
        size, is_difference = plain["size"], plain["is_difference"]
        if type(size) is not int or not 0 < size <= MOST_BYTES or size % PAGE_BYTES:
            raise SnapshotDamaged("memory map", expected=f"whole pages, at most {MOST_BYTES} bytes", found=_shown(size))
        if type(is_difference) is not bool:
            raise SnapshotDamaged("memory map", expected="is_difference true or false", found=_shown(is_difference))
        data, zero = runs_from_plain(plain["data"], size), runs_from_plain(plain["zero"], size)
        if zero and (not is_difference or overlap(data, zero)):
            raise SnapshotDamaged(
                "memory map", expected="runs of zeros in a difference, beside its data", found="others"
            )
        return cls(size=size, data=data, zero=zero, is_difference=is_difference)


def runs_to_plain(runs: Iterable[Run]) -> list[int]:
    """Gaps and runs by turns, in pages."""
    numbers: list[int] = []
    end = 0
    for offset, size in runs:
        numbers += ((offset - end) // PAGE_BYTES, size // PAGE_BYTES)
        end = offset + size
    return numbers


def runs_from_plain(numbers: object, limit: int) -> tuple[Run, ...]:
    """Runs that end at ``limit`` bytes at the latest. Raises SnapshotDamaged."""
    if not isinstance(numbers, list) or len(numbers) % 2 or not set(map(type, numbers)) <= {int}:
        raise SnapshotDamaged("memory map", expected="numbers of pages, gaps and runs by turns", found=_shown(numbers))
    if not numbers:
        return ()
    pages = limit // PAGE_BYTES
    if numbers[0] < 0 or min(numbers[1:]) < 1 or max(numbers) > pages or sum(numbers) > pages:
        raise SnapshotDamaged("memory map", expected=f"gaps and runs within {pages} pages", found="others")
    sizes = [page * PAGE_BYTES for page in numbers]
    return tuple(zip(list(accumulate(sizes))[::2], sizes[1::2], strict=True))


def runs_of(pages: bytes | bytearray, kind: int) -> tuple[Run, ...]:
    """The runs of pages that are ``kind`` (a byte), where ``pages`` says of each what it is."""
    found, one, run = [], bytes([kind]), re.compile(re.escape(bytes([kind])) + b"+")
    start = pages.find(one)  # much faster over what is between runs than the expression
    while start >= 0 and (match := run.match(pages, start)):
        end = match.end()
        found.append((start * PAGE_BYTES, (end - start) * PAGE_BYTES))
        start = pages.find(one, end)
    return tuple(found)


def overlap(runs: Sequence[Run], others: Sequence[Run]) -> bool:
    """Whether any byte is in both; each ascending and apart in itself."""
    every = sorted(chain(runs, others))
    return any(offset + size > following for (offset, size), (following, _) in pairwise(every))


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, (int, float, str, bool)) or value is None else type(value).__name__
