"""PortStream: a port of our own console device as an anyio byte stream.

    async for chunk in vm.ports["data"]: ...
    await vm.ports["data"].send(b"...")

The guest may open and close its end as often as it likes. While it has the port closed *after* it had it open, the
stream is at its end: ``receive`` raises EndOfStream (once all bytes from before are read) and ``send`` raises
BrokenResourceError. When the guest opens the port again, both work again, as with a FIFO; a close that an open follows
before anybody looks goes unseen, as there. Before it opens the port for the first time both wait. hvc0 is open as long
as the guest has a driver for it.

For bulk take a named port: Linux writes those in pieces of 32 KiB and goes on, hvc0 in small ones, waiting for each.
"""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint

from asyncvmm.devices.virtio.console.device import VirtioConsole
from asyncvmm.devices.virtio.console.port import ConsolePort
from asyncvmm.news import News


class PortStream(ByteStream):
    """The host's end of one port, on the event loop that the device's queues belong to.

    A slow reader holds the guest back, in memory of at most ``console.port.BACKLOG_BYTES``. hvc0 is held back once it
    is read; before, its newest bytes are kept and ``lost`` counts the others.
    """

    def __init__(self, device: VirtioConsole, port: ConsolePort) -> None:
        self._device = device
        self._port = port
        self._changes = News()
        self._receive_guard = anyio.ResourceGuard("reading from")
        self._send_guard = anyio.ResourceGuard("writing to")
        self._closed = self._ended = self._sent_eof = False
        port.changed = self._changes.tell
        with device.session():
            device.open_port(port)

    @property
    def name(self) -> str:
        """The port's name; ``console`` for hvc0."""
        return self._port.name

    @property
    def lost(self) -> int:
        """Bytes from the guest that nobody took."""
        return self._port.lost

    async def wait_open(self) -> None:
        """Until the guest has the port open. Raises EndOfStream if it has stopped, ClosedResourceError."""
        await checkpoint()
        while not self._port.guest_open:
            self._check_open()
            if self._ended:
                raise anyio.EndOfStream
            await self._changes.next()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one.

        Raises EndOfStream while the guest has the port closed after it had it open, and for good when it has stopped;
        ClosedResourceError, BusyResourceError.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        with self._receive_guard:
            await checkpoint()
            while True:
                self._check_open()
                if data := self._take(max_bytes):
                    return data
                if self._at_end and not self._port.backlog:
                    raise anyio.EndOfStream
                if not self._port.backlog:
                    await self._changes.next()

    def _take(self, most: int) -> bytes:
        """What is there; the guest may write as much again."""
        port = self._port
        with self._device.session() as running:
            port.reading = True
            data = port.take(most) if port.backlog else b""
            if running:
                self._device.take_more(port)
        return data

    async def send(self, item: bytes) -> None:
        """Returns when the guest's buffers have all of it; cancelled, they may have a part of it.

        Raises BrokenResourceError while the guest has the port closed after it had it open, and for good when it has
        stopped; ClosedResourceError, BusyResourceError.
        """
        with self._send_guard:
            await checkpoint()
            self._check_sendable()
            self._port.input = memoryview(item).cast("B")
            try:
                await self._send_input()
            finally:
                self._port.input = memoryview(b"")

    async def _send_input(self) -> None:
        while True:
            with self._device.session() as running:
                more = running and self._device.feed(self._port)
            if not self._port.input:
                return
            if more:
                await checkpoint()
            else:
                await self._changes.next()
            self._check_sendable()

    async def send_eof(self) -> None:
        """Send no more. The guest does not hear of it: its end knows open and closed alone."""
        self._check_open()
        self._sent_eof = True
        await checkpoint()

    async def aclose(self) -> None:
        """Give the port up: the guest sees it closed, and what nobody has read is lost."""
        if not self._closed:
            self._closed = True
            with self._device.session():
                self._device.close_port(self._port)
            self._port.changed = _nothing
            self._changes.tell()
        await checkpoint()

    def end(self) -> None:
        """The guest has stopped for good. For the machine, before guest memory is gone."""
        self._ended = True
        self._changes.tell()

    @property
    def _at_end(self) -> bool:
        return self._ended or (self._port.was_open and not self._port.guest_open)

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError

    def _check_sendable(self) -> None:
        if self._closed or self._sent_eof:
            raise anyio.ClosedResourceError
        if self._at_end:
            raise anyio.BrokenResourceError


def _nothing() -> None:
    pass
