"""Guest RAM as devices see it: one bounds-checked view, without copies.

Every address a guest names goes through ``view``. Python's integers do not overflow, so neither do the sums here.

What userspace writes is not in KVM's dirty log: whoever writes to guest RAM says so by ``mark``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol


class GuestFault(Exception):
    """The guest asked for something impossible; the text names the fact.

    It never leaves a transport: the device turns to DEVICE_NEEDS_RESET, and the host goes on.
    """


class DirtyPages(Protocol):
    """Whoever remembers what was written."""

    @property
    def is_on(self) -> bool:
        """Whether somebody wants to know at all, now."""


class _Always:
    is_on = True


class _Never:
    is_on = False


_Region = tuple[int, int, memoryview]
_NO_REGION: Final[_Region] = (0, 0, memoryview(b""))


def _no_mark(address: int, size: int) -> None:
    pass


def _no_fence() -> None:
    pass


class GuestView:
    """RAM regions as ``(first guest address, their bytes)``; what lies across two of them is refused.

    mark_dirty: is told of what the host wrote, as address and size. dirty: says when that need not be. fence: orders
    every store before it against every load behind it, also those of other CPUs; a lock taken and released does that.
    """

    def __init__(
        self,
        regions: Sequence[tuple[int, memoryview]],
        mark_dirty: Callable[[int, int], None] | None = None,
        fence: Callable[[], None] = _no_fence,
        dirty: DirtyPages | None = None,
    ) -> None:
        self._regions = tuple((start, start + len(view), view) for start, view in regions)
        self.first = self._regions[0] if regions else _NO_REGION
        self.mark = mark_dirty or _no_mark
        self.dirty: DirtyPages = _Never() if mark_dirty is None else dirty or _Always()
        self.fence = fence

    first: _Region
    """The first of the regions, for who looks there by himself: its address, the one behind it, its bytes."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Each region's first address and the one behind it."""
        return tuple((start, end) for start, end, _ in self._regions)

    def view(self, address: int, size: int) -> memoryview:
        """The bytes there, to be read or written in place. Raises GuestFault where they are not all RAM."""
        last = address + size
        for start, end, view in self._regions:
            if start <= address and last <= end:
                return view[address - start : last - start]
        raise GuestFault(f"{size} bytes at {address:#x} are not RAM")

    def read(self, address: int, size: int) -> bytes:
        """A copy. Raises GuestFault."""
        return bytes(self.view(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Raises GuestFault, with nothing written."""
        self.view(address, len(data))[:] = data
        self.mark(address, len(data))

    def close(self) -> None:
        """Know no RAM any more: it is about to be unmapped."""
        self._regions, self.first = (), _NO_REGION
