"""A copy-on-write disk: its own blocks in one image, all others read through from a base that nobody writes.

Making one costs nothing that grows with the base. A write of part of a block copies the block first; whole blocks are
written as they come.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from asyncvmm.storage.block_map import BlockMap
from asyncvmm.storage.image import Buffer, Image
from asyncvmm.storage.overlay_file import MAP_AT
from asyncvmm.storage.raw import RawImage


class MappedImage:
    """``base`` and ``top`` are of one size, and this image's from now on.

    keep: the map is saved in ``top``'s file at each flush and at the end, so that the overlay can be opened again.
    """

    def __init__(self, base: Image, top: RawImage, blocks: BlockMap, *, keep: bool) -> None:
        self.size = top.size
        self._base, self._top, self._blocks = base, top, blocks
        self._keep = keep
        self._open = True

    def read(self, offset: int, size: int) -> bytes | bytearray:
        """See Image."""
        pieces = [self._of(own).read(place, count) for own, place, count in self._blocks.runs(offset, size)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_now(self, offset: int, views: Sequence[memoryview]) -> bool:
        """See Image. What is partly the base's and partly not is left to ``read``."""
        size = sum(map(len, views))
        own, _, count = next(self._blocks.runs(offset, size), (True, offset, 0))
        return count == size and self._of(own).read_now(offset, views)

    def _of(self, own: bool) -> Image:
        return self._top if own else self._base

    def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
        """See Image."""
        size = sum(map(len, views))
        if not size:
            return
        first, last = self._prepare(offset, size)
        self._top.write(offset, views, sync=sync and not self._keep)
        self._blocks.mark(first, last)
        if sync and self._keep:
            self.flush()

    def _prepare(self, offset: int, size: int) -> tuple[int, int]:
        """Copy the blocks that the range covers in part; returns the first and last block it touches."""
        block = self._blocks.block
        end = offset + size
        first, last = offset // block, (end - 1) // block
        if offset % block:
            self._copy(first)
        if end % block and end != self.size:
            self._copy(last)
        return first, last

    def _copy(self, index: int) -> None:
        if self._blocks.is_own(index):
            return
        offset = index * self._blocks.block
        self._top.write(offset, [self._base.read(offset, min(self._blocks.block, self.size - offset))])
        self._blocks.mark(index, index)

    def discard(self, offset: int, size: int) -> None:
        """See Image. The overlay's whole blocks are freed; the base's stay as they are."""
        for own, place, count in self._blocks.runs(offset, size):
            if own:
                self._top.discard(place, count)

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """See Image."""
        if not size:
            return
        first, last = self._prepare(offset, size)
        self._top.zero(offset, size, unmap=unmap)
        self._blocks.mark(first, last)

    def flush(self) -> None:
        """See Image. First the blocks, then the map that says they are there."""
        self._top.flush()
        if self._keep and self._blocks.save(self._top.fd, MAP_AT):
            os.fdatasync(self._top.fd)

    def settle(self) -> None:
        """See Image. One that nobody opens again has its map on disk for a snapshot alone, without waiting for it."""
        if self._keep:
            self.flush()
        else:
            self._blocks.save(self._top.fd, MAP_AT)

    def close(self) -> None:
        """See Image."""
        if not self._open:
            return
        self._open = False
        try:
            if self._keep:
                self.flush()
        finally:
            self._blocks.close()
            self._top.close()
            self._base.close()
