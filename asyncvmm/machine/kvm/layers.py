"""Where each page of a restored guest's memory comes from: one of the snapshot's memory files, or nothing, as zeros.

The first layer is a full memory file, each further one a difference on those before it. What none of them holds is
zeros, of which large holes are left to anonymous memory: mapped from the file they would become pages of the page cache
when the guest touches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap, Run

MOST_LAYERS: Final = 254
"""Memory files that one VM is restored from."""

MOST_MAPPINGS: Final = 512
"""Pieces of differences that are mapped, each up to two mappings of the process more (vm.max_map_count is 65530 by
default). Those beyond are copied, the smallest ones."""

MOST_HOLES: Final = 16
LEAST_HOLE_BYTES: Final = 1 << 18
"""Holes of the full memory file that are left out of its mapping: the largest, each from that size on."""

_ZEROS: Final = 255
_SAME_OWNER: Final = re.compile(rb"(.)\1*", re.DOTALL)


@attrs.frozen
class Piece:
    """Pages with one origin: ``layer`` counts from the full memory file, 0; None is zeros. Offset and size in bytes.

    is_copied: there are too many to map this one.
    """

    offset: int
    size: int
    layer: int | None
    is_copied: bool = False


def arrange(size: int, maps: Sequence[MemoryMap]) -> tuple[Piece, ...]:
    """What to put where in memory of ``size`` bytes that is all zeros, one piece over the other in that order.

    Raises SnapshotDamaged for maps that do not fit, SnapshotMismatch for too many.
    """
    _check(size, maps)
    holes = _holes(size, maps[0])
    base = [Piece(offset, length, 0) for offset, length in _without((0, size), holes)]
    upper = []
    for owner, offset, length in _runs(_owners(size, maps)):
        if owner == _ZEROS:
            upper += [Piece(*run, None) for run in _without((offset, length), holes)]
        elif owner:
            upper.append(Piece(offset, length, owner))
    return (*base, *_within_bounds(upper))


def _check(size: int, maps: Sequence[MemoryMap]) -> None:
    if not maps or maps[0].is_difference:
        raise SnapshotMismatch("memory", expected="a full memory file at the bottom", found="none")
    if len(maps) > MOST_LAYERS:
        raise SnapshotMismatch("memory", expected=f"at most {MOST_LAYERS} layers", found=len(maps))
    for layer in maps:
        if layer.size != size:
            raise SnapshotDamaged("memory", expected=f"{size} bytes in each layer", found=f"{layer.size} bytes")
        for offset, length in (*layer.data, *layer.zero):
            if offset % PAGE_BYTES or length % PAGE_BYTES or not 0 <= offset < offset + length <= size:
                raise SnapshotDamaged("memory", expected="runs of pages within it", found=f"{offset}, {length}")


def _owners(size: int, maps: Sequence[MemoryMap]) -> bytearray:
    """A byte for each page: the layer that it is from."""
    owners = bytearray(size // PAGE_BYTES)
    for index, layer in enumerate(maps[1:], 1):
        for owner, runs in ((_ZEROS, layer.zero), (index, layer.data)):
            for offset, length in runs:
                first, count = offset // PAGE_BYTES, length // PAGE_BYTES
                owners[first : first + count] = bytes([owner]) * count
    return owners


def _runs(owners: bytearray) -> Iterator[tuple[int, int, int]]:
    for match in _SAME_OWNER.finditer(owners):
        yield match[1][0], match.start() * PAGE_BYTES, (match.end() - match.start()) * PAGE_BYTES


def _holes(size: int, base: MemoryMap) -> list[Run]:
    """The largest holes of the full file, ascending."""
    data = sorted(base.data)
    ends = [0, *(offset + length for offset, length in data)]
    starts = [*(offset for offset, _ in data), size]
    holes = [(start, end - start) for start, end in zip(ends, starts, strict=True) if end - start >= LEAST_HOLE_BYTES]
    return sorted(sorted(holes, key=lambda hole: -hole[1])[:MOST_HOLES])


def _without(run: Run, holes: Sequence[Run]) -> Iterator[Run]:
    """What of a run lies in no hole."""
    at, end = run[0], run[0] + run[1]
    for offset, length in holes:
        if offset + length > at and offset < end:
            if offset > at:
                yield at, offset - at
            at = min(end, offset + length)
    if at < end:
        yield at, end - at


def _within_bounds(pieces: Sequence[Piece]) -> list[Piece]:
    copied = {piece.offset for piece in sorted(pieces, key=lambda piece: -piece.size)[MOST_MAPPINGS:]}
    return [attrs.evolve(piece, is_copied=piece.offset in copied) for piece in pieces]
