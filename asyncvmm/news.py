"""Waiting on the loop for something that is told from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


class News:
    """Tasks that wait for something to change, or a condition to come true. Made on the loop on which they wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._waiters: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """Something changed: everybody looks again. From any thread; nothing happens on a loop that has closed."""
        if threading.get_ident() == self._thread:
            self._wake()
        else:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    async def until(self, condition: Callable[[], object]) -> None:
        """Return when ``condition`` holds: at once, or after something was told."""
        while not condition():
            await self.next()

    async def next(self) -> None:
        """Return after the next time something was told.

        Nothing slips in between a look and this: what another thread tells is heard on the loop, behind it.
        """
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
