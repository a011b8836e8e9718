"""A host port on which the guest may connect: a bounded line of connections, each an anyio byte stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from anyio.abc import Listener, TaskGroup
from anyio.lowlevel import checkpoint

from asyncvmm.news import News
from asyncvmm.vsock.stream import VsockStream


class VsockListener(Listener[VsockStream]):
    """Made by ``VsockHost.listen``. Connections are established as the guest asks; ``accept`` gives the oldest.

    With ``backlog`` of them waiting, further ones are refused. Raises ClosedResourceError once it, or the machine, is
    closed.
    """

    def __init__(self, port: int, backlog: int, on_close: Callable[[int], None]) -> None:
        self.port = port
        self._backlog = backlog
        self._on_close = on_close
        self._waiting: deque[VsockStream] = deque()
        self._news = News()
        self._closed = False

    @property
    def has_room(self) -> bool:
        """Whether one more may wait."""
        return not self._closed and len(self._waiting) < self._backlog

    def add(self, stream: VsockStream) -> None:
        """One more waits."""
        self._waiting.append(stream)
        self._news.tell()

    async def accept(self) -> VsockStream:
        """The next connection of the guest's."""
        await checkpoint()
        await self._news.until(lambda: self._waiting or self._closed)
        if self._closed:
            raise anyio.ClosedResourceError
        return self._waiting.popleft()

    async def serve(self, handler: Callable[[VsockStream], Any], task_group: TaskGroup | None = None) -> None:
        """Run ``handler(stream)`` for each connection, in ``task_group`` or one of its own, until cancelled."""
        if task_group is not None:
            while True:
                task_group.start_soon(handler, await self.accept())
        async with anyio.create_task_group() as own:
            await self.serve(handler, own)

    async def aclose(self) -> None:
        """Take no more; connections nobody has accepted are closed."""
        self.close()
        await checkpoint()

    def close(self) -> None:
        """The same, without a checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._on_close(self.port)
        while self._waiting:
            self._waiting.popleft().close()
        self._news.tell()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """None; ``port`` says where it listens."""
        return {}
