"""The chain of a snapshot: itself, its base, the base's base, to one that is full. And what they make together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.snapshot.manifest import Manifest
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap

MOST_LAYERS = 64
"""Snapshots in a chain."""

Piece = tuple[int, int, int]
"""Offset and size in bytes, and the number of the layer that holds them."""

_SAME = ("machine", "memory_mib", "vcpus", "regions")

_RUN_OF_ONE_KIND = re.compile(rb"([^\0])\1*", re.DOTALL)


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
    """Where each page that is not zeros is to be found, ascending. ``maps``: the full one's first, then differences."""
    if not maps:
        return ()
    newest = bytearray(maps[0].size // PAGE_BYTES)
    for layer, one in enumerate(maps):
        _paint(newest, one, layer + 1)
    found = _RUN_OF_ONE_KIND.finditer(newest)
    return tuple(
        (run.start() * PAGE_BYTES, (run.end() - run.start()) * PAGE_BYTES, newest[run.start()] - 1) for run in found
    )


def _paint(pages: bytearray, layer: MemoryMap, number: int) -> None:
    """Layer numbers fit a byte: MOST_LAYERS."""
    for runs, kind in ((layer.data, number), (layer.zero, 0)):
        for offset, size in runs:
            count = size // PAGE_BYTES
            pages[offset // PAGE_BYTES : offset // PAGE_BYTES + count] = bytes([kind]) * count
