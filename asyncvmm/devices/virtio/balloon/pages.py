"""Page numbers of a balloon as ranges of guest memory: checked, sorted, coalesced.

Facts: virtio 1.2, section 5.5.6 (an array of le32 page numbers, of 4 KiB pages whatever the guest's pages are).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

PFN_SHIFT = 12
PAGE_BYTES = 1 << PFN_SHIFT

MOST_PFNS = 1024
"""Page numbers in one request. Linux sends 256 of them, Windows a page full."""

Range = tuple[int, int]
"""First guest address, and bytes."""


def parse_pfns(data: bytes) -> tuple[int, ...]:
    """The page numbers of a request. Raises ValueError if it is not whole numbers, none, or more than MOST_PFNS."""
    count, rest = divmod(len(data), 4)
    if rest or not 0 < count <= MOST_PFNS:
        raise ValueError(f"expected 1 to {MOST_PFNS} page numbers of 4 bytes, found {len(data)} bytes")
    return struct.unpack(f"<{count}I", data)


def coalesce(pfns: Iterable[int]) -> list[Range]:
    """The pages as ranges, sorted, with neighbours joined; one that is named twice counts once."""
    ranges: list[Range] = []
    first = end = -1
    for pfn in sorted(pfns):
        if pfn > end:
            if end >= 0:
                ranges.append((first << PFN_SHIFT, end - first << PFN_SHIFT))
            first = pfn
        end = pfn + 1
    if end >= 0:
        ranges.append((first << PFN_SHIFT, end - first << PFN_SHIFT))
    return ranges


def within_ram(ranges: Iterable[Range], ram: Sequence[tuple[int, int]]) -> list[Range]:
    """What of the ranges is RAM. ``ram``: first address of each region and the one behind it; none is joined."""
    inside = []
    for address, size in ranges:
        for start, end in ram:
            first, last = max(address, start), min(address + size, end)
            if first < last:
                inside.append((first, last - first))
    return inside


def whole_pages(ranges: Iterable[Range]) -> list[Range]:
    """The whole pages in each range, sorted; those that touch are joined, and overlaps count once."""
    pages: list[Range] = []
    for address, size in sorted(ranges):
        first = -(-address // PAGE_BYTES) * PAGE_BYTES
        last = (address + size) // PAGE_BYTES * PAGE_BYTES
        if pages and first <= sum(pages[-1]):
            start = pages[-1][0]
            pages[-1] = (start, max(sum(pages[-1]), last) - start)
        elif first < last:
            pages.append((first, last - first))
    return pages


def total(ranges: Iterable[Range]) -> int:
    """Bytes of all ranges."""
    return sum(size for _, size in ranges)


def cut(ranges: Sequence[Range], size: int, count: int) -> tuple[list[Range], list[Range]]:
    """The first ``size`` bytes of the first ``count`` ranges, and the rest."""
    taken: list[Range] = []
    for place, (address, length) in enumerate(ranges):
        if place == count or not size:
            return taken, list(ranges[place:])
        if length > size:
            return [*taken, (address, size)], [(address + size, length - size), *ranges[place + 1 :]]
        taken.append((address, length))
        size -= length
    return taken, []
