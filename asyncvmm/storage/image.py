"""What holds a disk's bytes: the protocol that raw images, direct ones and overlays have in common.

Offsets and sizes are bytes within the disk; the caller has checked them against ``size``. Every method but ``read_now``
may wait for the disk: they are for a worker thread. All may raise OSError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

SECTOR: Final = 512

Buffer = bytes | bytearray | memoryview


class Image(Protocol):
    """``size``: the disk's bytes, a multiple of SECTOR; what its file lacks of that reads as zeroes."""

    size: int

    def read(self, offset: int, size: int) -> bytes | bytearray:
        """Those bytes."""
        ...

    def read_now(self, offset: int, views: Sequence[memoryview]) -> bool:
        """Fill ``views`` if that takes no waiting; False if it would, and they may hold anything then."""
        ...

    def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
        """Write ``views`` one behind the other; ``sync``: on stable storage at the return."""
        ...

    def discard(self, offset: int, size: int) -> None:
        """Nobody wants that range any more; where it cannot be freed nothing happens."""
        ...

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make the range read as zeroes; ``unmap``: its space may be freed."""
        ...

    def flush(self) -> None:
        """Everything written until now is on stable storage at the return."""
        ...

    def settle(self) -> None:
        """Whoever reads the image's file finds everything written until now."""
        ...

    def close(self) -> None:
        """Give everything back. May be called again."""
        ...


def whole_sectors(size: int) -> int:
    """``size`` rounded up to a multiple of SECTOR."""
    return -(-size // SECTOR) * SECTOR
