"""One connection as an anyio byte stream.

Nothing is buffered on the way to the guest: ``send`` returns when the guest has every byte in its own memory, so a
slow guest slows the sender, and a cancelled ``send`` has sent a beginning of it. On the way from the guest the bytes
wait in the connection, within the credit the guest was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint

from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.news import News

RECEIVE_SIZE: Final = 64 * 1024


class VsockAttribute(anyio.TypedAttributeSet):
    """What a VsockStream tells of itself, by ``stream.extra(...)``."""

    local_port: int = anyio.typed_attribute()
    """The host's port."""

    peer_port: int = anyio.typed_attribute()
    """The guest's port."""

    peer_cid: int = anyio.typed_attribute()
    """The guest's address."""


class VsockStream(ByteStream):
    """A connection to the guest, or from it. Made by VsockHost; to be used on its loop.

    Raises what anyio's byte streams do: EndOfStream when the guest has ended its side in order, BrokenResourceError
    when the connection was reset or the machine ended, ClosedResourceError after ``aclose``, BusyResourceError when
    two tasks send, or receive, at the same time.
    """

    def __init__(self, device: VirtioVsock, connection: Connection, on_close: Callable[[Connection], None]) -> None:
        self._device = device
        self._connection = connection
        self._on_close = on_close
        self._news = News()
        self._closed = False
        self._receiving = anyio.ResourceGuard("receiving from")
        self._sending = anyio.ResourceGuard("sending to")
        connection.observer = self._news.tell

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        """At least one byte, at most ``max_bytes``."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be positive")
        with self._receiving:
            if self._can_receive():
                await checkpoint()
            await self._news.until(self._can_receive)
            self._check_open()
            with self._device.host():
                data = self._connection.take(max_bytes)
        if data:
            return data
        raise anyio.EndOfStream if self._connection.at_end else anyio.BrokenResourceError

    async def send(self, item: bytes) -> None:
        """Return when the guest has all of it."""
        with self._sending:
            await checkpoint()
            self._check_open()
            if not self._connection.can_send:
                raise anyio.BrokenResourceError
            if item:
                await self._send(memoryview(item))

    async def _send(self, data: memoryview) -> None:
        connection = self._connection
        with self._device.host():
            connection.offer(data)
        try:
            await self._news.until(lambda: not connection.outgoing)
        except BaseException:
            with self._device.host():
                connection.withdraw()
            raise
        if connection.unsent:
            self._check_open()
            raise anyio.BrokenResourceError

    async def send_eof(self) -> None:
        """Tell the guest that no more will come; it may still send."""
        with self._sending:
            await checkpoint()
            self._check_open()
            with self._device.host():
                self._connection.finish_sending()

    async def aclose(self) -> None:
        """Close both sides. Whoever still sends or receives gets ClosedResourceError."""
        self.close()
        await checkpoint()

    def close(self) -> None:
        """The same, without a checkpoint."""
        if not self._closed:
            self._closed = True
            self._on_close(self._connection)
            self._news.tell()

    def _can_receive(self) -> bool:
        connection = self._connection
        return bool(connection.incoming) or connection.at_end or self.is_over or self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError

    async def until_over(self) -> None:
        """Return when ``is_over``, or closed here."""
        await self._news.until(lambda: self.is_over or self._closed)

    @property
    def is_over(self) -> bool:
        """Whether the guest can neither send nor take anything any more; what it sent may still wait here."""
        return self._connection.state is State.CLOSED

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """See VsockAttribute."""
        connection = self._connection
        return {
            VsockAttribute.local_port: lambda: connection.local_port,
            VsockAttribute.peer_port: lambda: connection.peer_port,
            VsockAttribute.peer_cid: lambda: connection.guest_cid,
        }
