"""The host's end of a guest's sockets: ``connect`` to a port of the guest, ``listen`` on one of the host.

Both machines have the same: the device's core is driven by virtio-mmio under KVM, by vhost-user under QEMU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.devices.virtio.vsock.muxer import MAX_CONNECTIONS, TooManyConnections
from asyncvmm.errors import ConfigError, StateError, VsockRefused, VsockTimeout
from asyncvmm.news import News
from asyncvmm.vsock.listener import VsockListener
from asyncvmm.vsock.stream import VsockStream

CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 8.0
"""How long a guest may take to confirm a close before the connection is reset; Linux waits as long."""

BACKLOG: Final = 128
MOST_PORT: Final = (1 << 32) - 2
"""The highest port; the one above it stands for any."""

Fallback = Callable[[Connection], bool]
"""Asked for a port that has no listener: whether it takes the guest's connection, to accept or end it later."""


class VsockHost:
    """The host's end of ``device``, which must be attached to its transport. Made, and to be used, on the loop.

    ``fallback`` answers for ports that nobody listens on; None refuses them. A device that is restored under a host
    tells its guest so with the next thing that happens, or when the host is made.
    """

    def __init__(self, device: VirtioVsock) -> None:
        self.device: Final = device
        self.fallback: Fallback | None = None
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[int, VsockListener] = {}
        self._connections: set[Connection] = set()
        self._closing: dict[Connection, float] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._called_again = False
        device.muxer.backend = self
        device.call_again = self._call_again
        device.be_patient(self._loop.call_later)
        with device.host():
            pass  # a guest that was restored learns now that its connections are gone

    async def connect(self, port: int, *, timeout: float | None = CONNECT_TIMEOUT_S) -> VsockStream:
        """A connection to ``port`` of the guest. ``timeout``: seconds for the guest's answer, None for any time.

        A guest without a driver for the device is waited for. Raises VsockRefused, VsockTimeout, ConfigError for
        what is no port, StateError when the machine has ended.
        """
        return self.stream(await self.open(port, timeout=timeout))

    async def open(self, port: int, *, timeout: float | None = CONNECT_TIMEOUT_S) -> Connection:
        """The same without a stream: whoever asks ``release``s it."""
        _check_port(port)
        await checkpoint()
        connection, news = self._request(port)
        try:
            with anyio.move_on_after(timeout):
                await news.until(lambda: connection.state is not State.REQUESTED)
            self._check_answer(connection, timeout)
        except BaseException:
            self.release(connection)
            raise
        return connection

    def listen(self, port: int, *, backlog: int = BACKLOG) -> VsockListener:
        """Take the guest's connections to ``port`` of the host.

        Raises ConfigError for what is no port or has a listener, StateError when the machine has ended.
        """
        _check_port(port)
        self._check_open()
        if port in self._listeners:
            raise ConfigError("vsock port", expected="a free one", found=port)
        listener = self._listeners[port] = VsockListener(port, backlog, self._forget_listener)
        return listener

    def stream(self, connection: Connection) -> VsockStream:
        """The connection as a byte stream, whose close releases it."""
        return VsockStream(self.device, connection, self.release)

    def requested(self, connection: Connection) -> None:
        """See muxer.Backend."""
        self._connections.add(connection)
        listener = self._listeners.get(connection.local_port)
        if listener is None:
            taken = self.fallback is not None and self.fallback(connection)
        else:
            taken = listener.has_room
            if taken:
                connection.accept()
                listener.add(self.stream(connection))
        if not taken:
            self._connections.discard(connection)
            self.device.muxer.release(connection)

    def close(self) -> None:
        """End every connection and listener: the machine has ended, or is about to. May be called again."""
        self._closed = True
        self.device.muxer.backend = None
        for listener in list(self._listeners.values()):
            listener.close()
        with self.device.host() as muxer:
            for connection in list(self._connections):
                muxer.kill(connection)
            self._closing.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _call_again(self) -> None:
        if not self._called_again:
            self._called_again = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._called_again = False
        with self.device.host():
            pass

    # -- connections ---------------------------------------------------------------------------------------------------

    def _request(self, port: int) -> tuple[Connection, News]:
        self._check_open()
        news = News()
        with self.device.host() as muxer:
            try:
                connection = muxer.connect(port)
            except TooManyConnections:
                raise VsockRefused(
                    "vsock connection", port=port, expected=f"fewer than {MAX_CONNECTIONS}", found=muxer.held
                ) from None
            connection.observer = news.tell
        self._connections.add(connection)
        return connection, news

    def _check_answer(self, connection: Connection, timeout: float | None) -> None:
        port = connection.peer_port
        if connection.state is State.REQUESTED:
            raise VsockTimeout("vsock connection", port=port, expected=f"an answer in {timeout} s", found="none")
        if self._closed:
            raise StateError("vsock connection", expected="a running machine", found="one that has ended")
        if connection.state is State.CLOSED and not connection.peer_shutdown:
            raise VsockRefused("vsock connection", port=port, expected="a listener in the guest", found="none")

    def release(self, connection: Connection) -> None:
        """The host has done with it, or does not want it. A guest that does not confirm the close in time is reset.

        May be called again.
        """
        if connection.released:
            return
        self._connections.discard(connection)
        with self.device.host() as muxer:
            connection.observer = lambda: self._settled(connection)
            muxer.release(connection)
            if connection.state is State.CLOSING:
                self._closing[connection] = self._loop.time() + CLOSE_TIMEOUT_S
        self._schedule_sweep()

    def _settled(self, connection: Connection) -> None:
        """Under the lock, from any thread: the guest confirmed a close, or its driver went."""
        if connection.state is State.CLOSED:
            self._closing.pop(connection, None)

    def _schedule_sweep(self) -> None:
        if self._sweeper is None and self._closing and not self._closed:
            self._sweeper = self._loop.call_later(CLOSE_TIMEOUT_S, self._sweep)

    def _sweep(self) -> None:
        """Reset what has waited too long for the guest's confirmation."""
        self._sweeper = None
        with self.device.host() as muxer:
            now = self._loop.time()
            for connection in [c for c, deadline in self._closing.items() if deadline <= now]:
                del self._closing[connection]
                connection.observer = _nothing
                muxer.kill(connection)
        self._schedule_sweep()

    def _forget_listener(self, port: int) -> None:
        self._listeners.pop(port, None)

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("vsock", expected="a running machine", found="one that has ended")


def _nothing() -> None:
    pass


def _check_port(port: int) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MOST_PORT:
        raise ConfigError("vsock port", expected=f"0 to {MOST_PORT}", found=repr(port))
