"""Bytes back and forth between a guest's stream and a unix socket, half-closes included."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Final

import anyio

from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.vsock.stream import VsockStream

SIZE: Final = 64 * 1024


class Relay:
    """Both directions between ``stream`` and ``client``, a socket that does not block; neither is closed here."""

    def __init__(self, stream: VsockStream, client: socket.socket, metrics: VsockMetrics) -> None:
        self._stream = stream
        self._client = client
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._both = anyio.CancelScope()
        self._drained = anyio.Event()

    async def run(self, first: bytes = b"") -> None:
        """Return when both directions have ended, or either side has gone. ``first``: what the client said already."""
        with self._both:
            async with anyio.create_task_group() as watch:
                async with anyio.create_task_group() as both:
                    both.start_soon(self._to_guest, first)
                    both.start_soon(self._from_guest)
                    watch.start_soon(self._end_with_guest)
                watch.cancel_scope.cancel()

    async def _end_with_guest(self) -> None:
        """A guest that has gone altogether leaves nobody to read for, once the client has all it said."""
        await self._drained.wait()
        await self._stream.until_over()
        self._both.cancel()

    async def _to_guest(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
            while data := await self._loop.sock_recv(self._client, SIZE):
                await self._stream.send(data)
            await self._stream.send_eof()
        except anyio.BrokenResourceError:
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_RD)
        except OSError:
            self._metrics.rx_read_fails += 1
            self._both.cancel()

    async def _from_guest(self) -> None:
        try:
            async for data in self._stream:
                await self._loop.sock_sendall(self._client, data)
            self._client.shutdown(socket.SHUT_WR)
            self._drained.set()
        except anyio.BrokenResourceError:
            self._both.cancel()
        except OSError:
            self._metrics.tx_write_fails += 1
            self._both.cancel()
