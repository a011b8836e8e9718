"""A disk at work: one thread carries its requests out, in their order, and gives them back to the loop in batches.

The loop never waits for the disk, however long that hangs. A thread that hangs in a system call cannot be ended: it is
left to itself, and ends nothing else (it is a daemon).
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from asyncio import AbstractEventLoop, Event
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

import anyio

from asyncvmm.device_config import CacheMode, DriveConfig
from asyncvmm.devices.virtio.block_io import BlockRequest
from asyncvmm.machine.threads import run_in_thread, start_thread
from asyncvmm.machine.waiting import in_thread, in_thread_or_here
from asyncvmm.mailbox import Mailbox
from asyncvmm.storage.image import Image
from asyncvmm.storage.opening import open_image
from asyncvmm.storage.overlay import Overlay
from asyncvmm.storage.work import merged, work_on

MOST_READ_NOW: Final = 1 << 20
"""Bytes of a read that the loop makes by itself if it need not wait; a larger one takes its time. A thread is handed a
copy of its own for each, and new memory for that costs more than the copy."""

HOLD_NS: Final = 2_000_000
"""How long the others of its batch may take before a request that is done is given back without them.

A loop that is woken meanwhile fights with this thread for the interpreter at every system call: with 32 small writes
under way, one wake-up for all of them makes the disk twice as fast, and none of them later.
"""

_DELIVERY: Final = 8
"""Batches given back in one turn of the loop."""

CLOSE_TIMEOUT_S: Final = 10.0

_log = logging.getLogger("asyncvmm.storage")

Deliver = Callable[[Sequence[BlockRequest]], None]


class Disk:
    """An image and the thread that works on it. ``start`` comes first, ``aclose`` or ``close`` last.

    cache: ``unsafe`` carries no flush out. Methods are called on the loop, but for ``abandon``. ``problem``: why the
    image could not be closed as it should; None if it could, or is open.
    """

    def __init__(self, image: Image, *, name: str = "drive", cache: CacheMode = "writeback", read_only: bool = False):
        self.size = image.size
        self.name = name
        self.read_only = read_only
        self._image = image
        self._unsafe = cache == "unsafe"
        self._batches: SimpleQueue[tuple[int, Sequence[BlockRequest]] | None] = SimpleQueue()
        self._room = memoryview(mmap.mmap(-1, MOST_READ_NOW))  # pages are taken as they are used
        self._epoch = 0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._left_memory = False
        self._ended = Event()
        self.problem: str | None = None

    def start(self, loop: AbstractEventLoop, deliver: Deliver) -> None:
        """Be ready for requests; ``deliver`` is given them back, on ``loop``, each exactly once. Raises HostError."""

        def turn() -> None:
            if batches := self._done.drain(_DELIVERY):
                deliver([request for batch in batches for request in batch])

        self._loop, self._turn = loop, turn
        self._done: Mailbox[Sequence[BlockRequest]] = Mailbox(lambda: loop.call_soon_threadsafe(turn))
        # On the loop: 0.04 ms, which is less than it takes to have a worker thread do it.
        thread = threading.Thread(target=self._work, name=f"disk-{self.name}", daemon=True)
        start_thread(thread)
        self._thread = thread

    # -- on the loop -----------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[BlockRequest]) -> None:
        """See BlockBackend. After ``close`` they come back as failed."""
        if self._closing:
            self._done.post(_failed(requests, "the disk is closed"))
        else:
            self._batches.put((self._epoch, requests))

    def read_now(self, offset: int, size: int) -> memoryview | None:
        """See BlockBackend. Not into guest RAM at once: what is there in part only would have been written to it."""
        if self._closing or size > MOST_READ_NOW:
            return None
        room = self._room[:size]
        return room if self._image.read_now(offset, (room,)) else None

    def abandon(self) -> None:
        """See BlockBackend."""
        self._epoch += 1

    async def settle(self) -> None:
        """Whoever reads the image's file finds everything written until now. Nothing may be under way.

        Raises OSError.
        """
        await in_thread(self._image.settle)

    def close(self) -> None:
        """Begin to end: nothing more is taken, and what has not begun is given back as failed. Does not wait."""
        self.abandon()
        self._end()

    def _end(self) -> None:
        if not self._closing:
            self._closing = True
            self._batches.put(None)

    async def aclose(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Carry out what was submitted, then close the image; after ``timeout_s`` that is left to itself.

        Returns whether guest memory is free: while a request hangs, it must not be unmapped. An image that could not
        be written whole at its end is an error in the log, and in ``problem``.
        """
        self._end()
        if self._thread is None:
            await in_thread_or_here(self._close_image)
        else:
            with anyio.move_on_after(timeout_s):
                await self._ended.wait()
            self.abandon()
            while len(self._done):
                self._turn()
        return self._thread is None or self._left_memory

    # -- on the disk's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._work_on_batch():
            pass
        self._left_memory = True
        self._close_image()
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)

    def _work_on_batch(self) -> bool:
        """A call of its own, for its variables hold views of guest RAM."""
        item = self._batches.get()
        if item is None:
            return False
        epoch, batch = item
        done: list[BlockRequest] = []
        until_ns = time.monotonic_ns() + HOLD_NS
        for group in merged(batch):
            if epoch == self._epoch:
                work_on(self._image, group, unsafe=self._unsafe)
            else:
                _failed(group, "abandoned")
            done += group
            if time.monotonic_ns() > until_ns:
                self._done.post(done)
                done, until_ns = [], time.monotonic_ns() + HOLD_NS
        if done:
            self._done.post(done)
        return True

    def _close_image(self) -> None:
        try:
            self._image.close()
        except OSError as error:
            self.problem = error.strerror
            _log.error("the image of %s could not be written whole at its end: %s", self.name, error.strerror)


def _failed(requests: Sequence[BlockRequest], why: str) -> Sequence[BlockRequest]:
    for request in requests:
        request.failed = why
    return requests


async def open_disk(drive: DriveConfig, overlay: Overlay | None = None) -> Disk:
    """The disk of a drive, opened and locked; it writes to ``overlay`` if there is one.

    Raises DriveError, DriveBusy, ImageError, each with the path.
    """
    opened: list[Image] = []
    wanted = True

    def work() -> Image:
        opened.append(open_image(drive, overlay))
        if not wanted:
            opened[0].close()
        return opened[0]

    try:
        image = await run_in_thread(work, abandon_on_cancel=True)  # opening may hang, too
    except BaseException:  # a cancelled task does not get what its thread opens
        wanted = False
        for image in opened:
            image.close()
        raise
    return Disk(image, name=drive.id or "drive", cache=drive.cache, read_only=drive.read_only)
