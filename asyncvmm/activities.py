"""Activities: what is under way at a VM that its end must neither overtake nor wait for: a boot, a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import anyio

from asyncvmm.errors import StateError
from asyncvmm.machine.waiting import wait_out


class Activities:
    """Those of one VM. Each runs in a task of its own caller."""

    def __init__(self) -> None:
        self.ended = False
        """Whether ``end_all`` was called."""
        self._under_way: dict[anyio.CancelScope, anyio.Event] = {}

    @contextmanager
    def begin(self, what: str) -> Iterator[None]:
        """What the block does is under way. Raises StateError if it was ended by ``end_all``."""
        done = anyio.Event()
        with anyio.CancelScope() as scope:
            self._under_way[scope] = done
            try:
                yield
            finally:
                del self._under_way[scope]
                done.set()
        if scope.cancelled_caught:
            raise StateError(what, expected="a VM that nobody stops meanwhile", found="stop()")

    async def end_all(self) -> None:
        """Cancel all, and wait until each has cleared up behind itself; a cancellation is heard then."""
        self.ended = True
        under_way = dict(self._under_way)
        for scope in under_way:
            scope.cancel()
        if under_way:
            await wait_out(asyncio.ensure_future(_all(under_way.values())))


async def _all(events: Iterable[anyio.Event]) -> None:
    for event in events:
        await event.wait()
