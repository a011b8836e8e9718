"""What a block device asks of whoever holds its disk: one record a request, and the protocol they travel by."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

from asyncvmm.devices.virtio.queue import Chain


class Operation(IntEnum):
    """What is to be done with the disk."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4


class BlockRequest:
    """One request on its way to the disk and back.

    offset, size: the range, in bytes, checked against the disk's. views: what is to be written, in guest RAM; nobody
    may touch them once ``chain`` is of the past, but to read. ranges: offset, size and whether the space may be freed,
    of each part of DISCARD and ZERO. sync: a write that is on stable storage when it comes back.

    The backend sets ``result``, the bytes of a READ, or ``failed``, why there are none.
    """

    __slots__ = ("began_ns", "chain", "failed", "offset", "operation", "ranges", "result", "size", "sync", "views")

    def __init__(
        self,
        chain: Chain,
        operation: Operation,
        offset: int = 0,
        size: int = 0,
        views: Sequence[memoryview] = (),
        ranges: Sequence[tuple[int, int, bool]] = (),
        sync: bool = False,
        began_ns: int = 0,
    ) -> None:
        self.chain = chain
        self.operation = operation
        self.offset, self.size = offset, size
        self.views, self.ranges = views, ranges
        self.sync = sync
        self.began_ns = began_ns
        self.result: bytes | bytearray | memoryview = b""
        self.failed: str | None = None


class BlockBackend(Protocol):
    """The disk as the device sees it. On the loop, but for ``abandon``; none of it waits."""

    def submit(self, requests: Sequence[BlockRequest]) -> None:
        """Carry these out, in their order; each comes back exactly once, by the device's ``complete``."""
        ...

    def read_now(self, offset: int, size: int) -> memoryview | None:
        """Those bytes, good until the next call, if that takes no waiting; None if it would."""
        ...

    def abandon(self) -> None:
        """Nobody wants what was submitted and has not begun. From any thread; the requests come back all the same."""
        ...
