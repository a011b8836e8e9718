"""A console port's socket as a byte stream, as PortStream (asyncvmm/streams/port.py) is to the KVM machine.

What is not read stays in the socket, and holds its writer back there. A socket does not say when the guest opens and
closes its end: the stream's end is that of the guest's machine. Its last bytes outlive that, its descriptor does not.
"""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint

from asyncvmm.errors import StateError
from asyncvmm.machine.qemu.channel import READ_SIZE, Channel


class ChannelStream(ByteStream):
    """The host's half of the port ``name``."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel
        self._rest = b""
        self._receive_guard = anyio.ResourceGuard("reading from")
        self._send_guard = anyio.ResourceGuard("writing to")
        self._closed = self._sent_eof = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one.

        Raises EndOfStream when the guest's machine has ended and all is read, ClosedResourceError, BusyResourceError.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        with self._receive_guard:
            await checkpoint()
            while not (data := self._take(max_bytes)):
                self._check_open()
                if self._channel.ended or self._channel.closed:
                    raise anyio.EndOfStream
                await self._channel.wait_readable()
            return data

    async def send(self, item: bytes) -> None:
        """Returns when the port's socket has all of it; cancelled, it has a beginning of it.

        Raises BrokenResourceError when the guest's machine has ended, ClosedResourceError, BusyResourceError.
        """
        with self._send_guard:
            await checkpoint()
            if self._closed or self._sent_eof:
                raise anyio.ClosedResourceError
            try:
                await self._channel.write(item)
            except StateError as error:
                self._check_open()
                raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Send no more. The guest does not hear of it: QEMU would take half a connection for none."""
        self._check_open()
        self._sent_eof = True
        await checkpoint()

    async def aclose(self) -> None:
        """Give the port up: the guest sees it closed, and what nobody has read is lost. May be called again."""
        self._closed = True
        self._rest = b""
        self._channel.close()
        await checkpoint()

    def finish(self) -> None:
        """The machine has ended: keep what it left in the socket, which is bounded, and free the socket."""
        left = []
        while not self._closed and (data := self._channel.read()):
            left.append(data)
        self._rest += b"".join(left)
        self._channel.close()

    def _take(self, size: int) -> bytes:
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
            return data
        return self._channel.read(min(size, READ_SIZE))

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
