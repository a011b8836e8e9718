"""One port of a console: what the guest has written and nobody read yet, what the guest is to read, who has it open.

The console port (port 0) differs from the others. Linux waits for its bytes to be taken with interrupts off, so as long
as nobody reads them the newest are kept and the older ones dropped and counted. Whoever reads gets all from then on,
and the guest waits for him.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from asyncvmm.devices.virtio.queue import Chain

BACKLOG_BYTES: Final = 1 << 20
"""Bytes from the guest held for a reader. With more the guest waits."""

MOST_PIECES: Final = 1024
"""What the guest wrote apart is held apart, up to so many pieces: each costs memory of its own."""


class ConsolePort:
    """Both directions. All of it is used with the device's lock held, and belongs to the loop but for
    ``forget_driver``.

    name: the port's, in the guest too. is_console: it is hvc0. host_open: somebody on the host has it. reading:
    somebody reads it. guest_open: somebody in the guest has it; was_open: somebody had. input: what the guest is still
    to get. lost: bytes from the guest that nobody took. changed: called when there are bytes to read, ``input`` has
    been taken, or the guest has opened or closed it; from any thread, since a driver goes on a vCPU's.
    """

    __slots__ = (
        "backlog",
        "chain",
        "changed",
        "guest_open",
        "host_open",
        "input",
        "is_console",
        "limit",
        "lost",
        "name",
        "number",
        "offset",
        "pieces",
        "reading",
        "ready",
        "throttled",
        "was_open",
    )

    def __init__(self, number: int, name: str, *, is_console: bool = False, limit: int = BACKLOG_BYTES) -> None:
        self.number = number
        self.name = name
        self.is_console = is_console
        self.limit = limit
        self.changed: Callable[[], None] = _nothing
        self.host_open = self.reading = False
        self.was_open = False
        self.lost = 0
        self.pieces: deque[bytes | memoryview] = deque()
        self.backlog = 0
        self.input = memoryview(b"")
        self.forget_driver()

    def forget_driver(self) -> None:
        """The driver is gone. What it wrote may still be read."""
        self.ready = self.guest_open = self.throttled = False
        self.chain: Chain | None = None
        self.offset = 0

    @property
    def room(self) -> int:
        """Bytes that may be taken from the guest now."""
        return self.limit - self.backlog if self._holds_back else self.limit

    @property
    def _holds_back(self) -> bool:
        """Whether the guest waits for the reader; the bytes of a port that nobody has open are dropped."""
        return self.reading if self.is_console else self.host_open

    def append(self, data: bytes) -> int:
        """Bytes from the guest; returns how many were dropped for them, the oldest first."""
        self.pieces.append(data)
        self.backlog += len(data)
        if len(self.pieces) > MOST_PIECES:
            self.pieces = deque((b"".join(self.pieces),))
        if self._holds_back:
            return 0
        return self._drop(self.limit if self.is_console else 0)

    def _drop(self, most: int) -> int:
        """Keep the newest ``most`` bytes."""
        dropped = max(0, self.backlog - most)
        if dropped:
            self.lost += dropped
            self.take_exactly(dropped)
        return dropped

    def discard(self) -> int:
        """Drop what nobody has read; returns how much that was."""
        return self._drop(0)

    def take(self, most: int) -> bytes:
        """Up to ``most`` bytes from the guest; a large piece comes as it is, without a copy."""
        first = self.pieces[0]
        if len(first) <= most and (len(self.pieces) == 1 or len(first) + len(self.pieces[1]) > most):
            self.backlog -= len(first)
            del self.pieces[0]
            return first if isinstance(first, bytes) else bytes(first)
        return self.take_exactly(min(most, self.backlog))

    def take_exactly(self, size: int) -> bytes:
        """The next ``size`` bytes; there must be as many."""
        taken = []
        self.backlog -= size
        while size:
            piece = self.pieces.popleft()
            if len(piece) > size:
                self.pieces.appendleft(memoryview(piece)[size:])
                piece = memoryview(piece)[:size]
            taken.append(piece)
            size -= len(piece)
        return b"".join(taken)


def _nothing() -> None:
    pass
