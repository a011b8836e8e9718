"""The chain of a snapshot: itself, its base, the base's base, to one that is full. And what they make together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.snapshot.manifest import Manifest
from asyncvmm.snapshot.memory_map import MemoryMap

MOST_LAYERS = 64
"""Snapshots in a chain."""

Piece = tuple[int, int, int]
"""Offset and size in bytes, and the number of the layer that holds them."""

_SAME = ("machine", "memory_mib", "vcpus", "regions")


def check_base(chain: Sequence[Manifest], base: Manifest) -> None:
    """That ``base`` is what the last of ``chain``, its newest first, is a difference of.

    Raises SnapshotMismatch for another snapshot, SnapshotDamaged for a chain that has no end.
    """
    above = chain[-1]
    assert above.base is not None
    if base.id != above.base.id:
        raise SnapshotMismatch("base of a difference", expected=above.base.id, found=base.id)
    if any(base.id == manifest.id for manifest in chain):
        raise SnapshotDamaged("chain of snapshots", expected="a full one at its end", found=f"{base.id} twice")
    if len(chain) >= MOST_LAYERS:
        raise SnapshotDamaged("chain of snapshots", expected=f"at most {MOST_LAYERS}", found="more")
    for field in _SAME:
        if (expected := getattr(above, field)) != (found := getattr(base, field)):
            raise SnapshotMismatch(f"base of a difference, {field}", expected=expected, found=found)


def merge(maps: Sequence[MemoryMap]) -> tuple[Piece, ...]:
    """Where each page that is not zeros is to be found, ascending. ``maps``: the full one's first, then differences.

    Goes over the edges of all runs; of the layers that say anything about what follows an edge, the newest counts.
    """
    pieces: list[Piece] = []
    said = data = begin = 0
    owner: int | None = None
    for offset, bit, is_data in sorted(_edges(maps)):
        if owner is not None and begin < offset:
            _append(pieces, begin, offset, owner)
        said ^= bit
        data ^= bit if is_data else 0
        newest = said.bit_length() - 1
        owner, begin = (newest if data >> newest & 1 else None) if said else None, offset
    return tuple(pieces)


def _edges(maps: Sequence[MemoryMap]) -> Iterator[tuple[int, int, bool]]:
    """Offsets at which a layer, as a bit, begins or ends to say something: to have data, or zeros."""
    for layer, one in enumerate(maps):
        for runs, is_data in ((one.data, True), (one.zero, False)):
            for offset, size in runs:
                yield offset, 1 << layer, is_data
                yield offset + size, 1 << layer, is_data


def _append(pieces: list[Piece], begin: int, end: int, owner: int) -> None:
    if pieces and pieces[-1][2] == owner and sum(pieces[-1][:2]) == begin:
        begin = pieces.pop()[0]
    pieces.append((begin, end - begin, owner))
