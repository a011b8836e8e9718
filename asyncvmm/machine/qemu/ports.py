"""A console port's socket as a byte stream. What is not read stays in the socket, and holds its writer back there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from asyncvmm.errors import StateError
from asyncvmm.machine.qemu.channel import READ_SIZE, Channel


class ChannelStream(ByteStream):
    """The host's half of the port ``name``. Its end is the end of the guest's machine."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel
        self._rest = b""
        self._receiving = False
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Some bytes that the guest wrote, as soon as there are any.

        Raises EndOfStream when the guest's machine has ended and all is read, ClosedResourceError after ``aclose``,
        BusyResourceError if another task receives.
        """
        await anyio.lowlevel.checkpoint()
        if self._receiving:
            raise anyio.BusyResourceError("receiving from")
        self._receiving = True
        try:
            while not (data := self._take(max_bytes)):
                self._check_open()
                if self._channel.ended or self._channel.closed:
                    raise anyio.EndOfStream
                await self._channel.wait_readable()
            return data
        finally:
            self._receiving = False

    async def send(self, item: bytes) -> None:
        """Send all of ``item``; returns when the port's socket has taken it. Cancelled, it has sent a beginning.

        Raises BrokenResourceError when the guest's machine has ended, ClosedResourceError after ``aclose``.
        """
        await anyio.lowlevel.checkpoint()
        self._check_open()
        try:
            await self._channel.write(item)
        except StateError as error:
            self._check_open()
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Nothing: a port has no half that could be closed alone."""
        self._check_open()

    async def aclose(self) -> None:
        """Close the port: the guest sees its host's side gone, for good. May be called again."""
        self._closed = True
        self._rest = b""
        self._channel.close()
        await anyio.lowlevel.checkpoint()

    def finish(self) -> None:
        """The machine has ended: keep what it left in the socket, which is bounded, and free the socket."""
        left = []
        while not self._closed and (data := self._channel.read()):
            left.append(data)
        self._rest += b"".join(left)
        self._channel.close()

    @property
    def extra_attributes(self) -> Mapping[Any, Any]:
        """None are known."""
        return {}

    def _take(self, size: int) -> bytes:
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
            return data
        return self._channel.read(min(size, READ_SIZE))

    def _check_open(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
