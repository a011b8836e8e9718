"""MemoryMap: which parts of a guest's memory a snapshot's memory file holds, which are zeros, which are the base's.

An offset is the same in the file and in memory, where RAM regions lie back to back. What the file does not hold is a
hole in it: zeros in a full snapshot, the base's in one that is a difference.
"""

from __future__ import annotations

import attrs

PAGE_BYTES = 4096

Run = tuple[int, int]
"""Offset and size in bytes, both whole pages."""


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
        return sum(size for _, size in self.data)
