"""SocketPort: a console port whose other end is a connected unix socket, as a QEMU chardev offers it.

It behaves as PortStream does, but for what a socket cannot say: the guest's opening and closing of the port. Its end
comes when the machine's does.
"""

from __future__ import annotations

import socket
from typing import Self

import anyio
from anyio.abc import ByteStream, SocketStream, UNIXSocketStream


class SocketPort(ByteStream):
    """The host's end of one port."""

    def __init__(self, stream: SocketStream, name: str) -> None:
        """Takes over a connected stream."""
        self.name = name
        self._stream = stream
        self._sent_eof = False

    @classmethod
    async def from_socket(cls, sock: socket.socket | int, name: str) -> Self:
        """Takes over a connected unix socket, or its descriptor."""
        return cls(await UNIXSocketStream.from_socket(sock), name)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at least one. Raises EndOfStream when the machine has ended, ClosedResourceError,
        BusyResourceError."""
        try:
            return await self._stream.receive(max_bytes)
        except anyio.BrokenResourceError:
            # A child that ends with our bytes unread resets the connection: it has ended all the same.
            raise anyio.EndOfStream from None

    async def send(self, item: bytes) -> None:
        """Returns when the socket has all of it. Raises BrokenResourceError when the machine has ended,
        ClosedResourceError, BusyResourceError."""
        if self._sent_eof:
            raise anyio.ClosedResourceError
        await self._stream.send(item)

    async def send_eof(self) -> None:
        """Send no more. The socket stays as it is: QEMU would take half a connection for none."""
        self._sent_eof = True

    async def aclose(self) -> None:
        """Close the socket."""
        await self._stream.aclose()
