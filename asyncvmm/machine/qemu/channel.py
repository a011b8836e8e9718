"""One end of a socket pair on the event loop: bounded reads from callbacks, awaited writes, a safe end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable

from asyncvmm.errors import MachineError, StateError

READ_SIZE = 64 * 1024
"""Most bytes one read takes, so that no peer keeps the loop from turning."""

SEND_BUFFER = 1 << 20
"""Asked for QEMU's end. It writes byte by byte, and each byte is charged with its bookkeeping (some 770 bytes): the
usual 208 KiB hold 278 of them. The kernel cuts this down to what it allows."""

INPUT_BUFFER = 1 << 14
"""Asked for our end: what is typed ahead of a guest that does not read. More waits in ``write``."""


MOST_UNREAD = 1 << 17
"""Bytes of what was sent last that are remembered: more than the socket can hold."""


class Channel:
    """Our end of a socket pair; ``peer`` is the other. ``received`` counts the bytes read, ``sent`` those written.

    ``ended`` is set once the peer has gone. Raises MachineError when there are no descriptors left.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        try:
            self._socket, self.peer = socket.socketpair()
        except OSError as error:
            raise MachineError("socket pair", expected="two free descriptors", found=error.strerror) from error
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, INPUT_BUFFER)
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._turn = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._readable: asyncio.Future[None] | None = None
        self._theirs = -1
        self._last = bytearray()
        self.received = self.sent = 0
        self.ended = False
        self.closed = False

    def watch(self, on_readable: Callable[[], object]) -> None:
        """Call ``on_readable`` on the loop whenever there is something to read."""
        self._loop.add_reader(self._socket, on_readable)

    def read(self, size: int = READ_SIZE) -> bytes:
        """What is there, at most ``size`` bytes; empty if nothing is, or nothing will ever be again (``ended``)."""
        if self.ended or self.closed:
            return b""
        try:
            data = self._socket.recv(size)
        except (BlockingIOError, InterruptedError):
            return b""
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
            self._loop.remove_reader(self._socket)
        self.received += len(data)
        return data

    async def wait_readable(self) -> None:
        """Until there is something to read, or nothing will ever be again; instead of ``watch``, and for one only."""
        if self.ended or self.closed:
            return
        future = self._readable = self._loop.create_future()
        self._loop.add_reader(self._socket, _resolve, future)
        try:
            await future
        finally:
            self._readable = None
            if not self.closed:
                self._loop.remove_reader(self._socket)

    def write_now(self, data: bytes) -> None:
        """Send a few bytes into the empty socket, before anybody reads it."""
        self._socket.sendall(data)
        self._count(data)

    def remember_sent(self) -> None:
        """Be able to say, from now on, what is ``unread``. The socket does not tell then that its peer has gone."""
        self._theirs = os.dup(self.peer.fileno())

    def unread(self) -> bytes:
        """What was sent and the peer has not taken yet."""
        if self._theirs < 0:
            return b""
        (size,) = struct.unpack("i", fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)))
        return bytes(self._last[-size:]) if size else b""

    def send_unread(self, data: bytes) -> None:
        """Send what was ``unread`` elsewhere into the empty socket, although nobody may take it for now.

        Raises OSError if that cannot be all.
        """
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, INPUT_BUFFER + 2 * len(data))
        try:
            self.write_now(data)
        finally:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, INPUT_BUFFER)

    async def write(self, data: bytes, descriptor: int | None = None) -> None:
        """Send all of ``data``, in one piece among several writers; a copy of ``descriptor`` goes with the first byte.

        Cancelled, it has sent a beginning of it. Raises StateError when the channel is closed meanwhile.
        """
        async with self._turn:
            rest = memoryview(data)
            while rest:
                sent = self._send_some(rest, descriptor)
                rest = rest[sent:]
                if sent:
                    descriptor = None
                if rest:
                    await self._wait_writable()

    def _send_some(self, data: memoryview, descriptor: int | None) -> int:
        if self.closed:
            raise StateError("the guest's machine has ended", expected="a running machine")
        try:
            sent = (
                self._socket.send(data) if descriptor is None else socket.send_fds(self._socket, [data], [descriptor])
            )
        except (BlockingIOError, InterruptedError):
            return 0
        except ConnectionError as error:
            raise StateError("the guest's machine has ended", expected="a running machine") from error
        self._count(data[:sent])
        return sent

    def _count(self, data: bytes | memoryview) -> None:
        self.sent += len(data)
        if self._theirs >= 0:
            self._last += data
            if len(self._last) > 2 * MOST_UNREAD:
                del self._last[:-MOST_UNREAD]

    async def _wait_writable(self) -> None:
        future = self._writable = self._loop.create_future()
        self._loop.add_writer(self._socket, _resolve, future)
        try:
            await future
        finally:
            self._writable = None
            if not self.closed:
                self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close both ends and wake whoever waits at ours. May be called again."""
        self.peer.close()
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for waiting in (self._writable, self._readable):
            if waiting is not None:
                _resolve(waiting)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
