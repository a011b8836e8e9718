"""Bytes back and forth between a guest's connection and a unix socket, half-closes included.

There is no task in either direction: what the guest sends goes to the socket in the turn of the loop that takes it out
of the queue, and what is read from the socket is in the guest's memory, with an interrupt, when the reader's turn ends.
Where one side is slow, the other is not looked at until it has caught up.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from asyncvmm.devices.virtio.vsock.connection import Connection, Payload, State
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.metrics.groups import VsockMetrics

SIZE: Final = 64 * 1024
"""Bytes read from a socket at a time."""

AT_ONCE: Final = 4096
"""Bytes of a packet that goes to the socket by itself, without a copy; smaller ones of one turn go together."""


def _ignore() -> None:
    pass


class Relay:
    """Both directions between ``connection`` of ``device`` and ``client``, a socket that does not block; neither is
    closed here. Made, and to be used, on the loop."""

    def __init__(
        self, device: VirtioVsock, connection: Connection, client: socket.socket, metrics: VsockMetrics
    ) -> None:
        self._device = device
        self._connection = connection
        self._client = client
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._fd = client.fileno()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._is_due = self._is_reading = self._is_client_full = False
        self._client_ended = self._guest_ended = False

    async def run(self, first: bytes = b"") -> None:
        """Return when both directions have ended, or either side has gone. ``first``: what the client said already."""
        connection = self._connection
        connection.observer, connection.sink = self._changed, self._send_at_once
        try:
            self._offer(first)
            self._turn()
            await self._over
        finally:
            connection.observer, connection.sink = _ignore, None
            self._end()

    def _end(self) -> None:
        self._stop()
        if not self._over.done():
            self._over.set_result(None)

    def _stop(self) -> None:
        self._read(wanted=False)
        self._wait_for_client(full=False)

    def _watches(self, add: Callable[[int, Callable[[], None]], object], told: Callable[[], None]) -> bool:
        """False if it cannot be watched, which ends this relay: what raises in a turn ends the machine."""
        try:
            add(self._fd, told)
        except OSError:  # more than the kernel lets one user have
            self._metrics.muxer_event_fails += 1
            self._end()
            return False
        return True

    # -- the connection has changed ------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Under the lock, from any thread: look at it soon, once."""
        if self._is_due:
            return
        self._is_due = True
        if threading.get_ident() != self._thread:
            with suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._turn)
        elif not self._device.at_end_of_turn(self._look):
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        with self._device.host():
            self._look()

    def _look(self) -> None:
        """Do what can be done now, in a session on the loop. What changes behind it is another turn's."""
        self._is_due = True
        try:
            if not self._over.done():
                self._send()
            if not self._over.done():
                self._settle()
        finally:
            self._is_due = False

    def _settle(self) -> None:
        connection = self._connection
        if connection.unsent and not connection.outgoing:  # it came to nothing: the guest takes no more
            self._hang_up(socket.SHUT_RD)
            self._client_ended = True
        if self._guest_ended and (self._client_ended or connection.state is State.CLOSED):
            self._end()
        else:
            wanted = not (self._client_ended or connection.outgoing)
            if wanted is not self._is_reading:
                self._read(wanted=wanted)

    # -- from the guest ------------------------------------------------------------------------------------------------

    def _send_at_once(self, payload: Payload) -> int:
        """See Connection.sink."""
        if len(payload) < AT_ONCE or self._is_client_full:
            return 0
        try:
            return self._client.send(payload)
        except OSError:  # found again, and dealt with, by the turn that comes with what is left
            return 0

    def _send(self) -> None:
        connection = self._connection
        if self._guest_ended:
            self._drop_waiting()
        elif connection.incoming and not self._is_client_full and not self._send_waiting():
            self._metrics.tx_write_fails += 1
            self._refuse_more()
        elif connection.incoming:
            return
        elif connection.at_end:
            self._guest_ended = True
            self._hang_up(socket.SHUT_WR)
        elif connection.state is State.CLOSED:
            self._end()

    def _send_waiting(self) -> bool:
        """False if the client takes no more."""
        try:
            self._connection.drop(self._client.send(self._connection.incoming))
        except BlockingIOError:
            pass
        except OSError:
            return False
        if self._connection.incoming:
            self._wait_for_client(full=True)
        return True

    def _refuse_more(self) -> None:
        """The client takes no more, but what it said before, or says still, is to reach the guest."""
        self._guest_ended = True
        self._drop_waiting()
        self._connection.finish_receiving()

    def _drop_waiting(self) -> None:
        if waiting := len(self._connection.incoming):
            self._connection.drop(waiting)

    def _wait_for_client(self, *, full: bool) -> None:
        if full and not self._is_client_full:
            if not self._watches(self._loop.add_writer, self._client_has_room):
                return
        elif self._is_client_full and not full:
            self._loop.remove_writer(self._fd)
        self._is_client_full = full

    def _client_has_room(self) -> None:
        self._wait_for_client(full=False)
        self._turn()

    def _hang_up(self, how: int) -> None:
        with suppress(OSError):
            self._client.shutdown(how)

    # -- to the guest --------------------------------------------------------------------------------------------------

    def _read(self, *, wanted: bool) -> None:
        if wanted and not self._is_reading:
            if not self._watches(self._loop.add_reader, self._client_has_data):
                return
        elif self._is_reading and not wanted:
            self._loop.remove_reader(self._fd)
        self._is_reading = wanted

    def _client_has_data(self) -> None:
        try:
            data = self._client.recv(SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._metrics.rx_read_fails += 1
            self._end()
            return
        if not data:
            self._end_sending()
        elif not self._offer(data):
            self._turn()

    def _offer(self, data: bytes) -> bool:
        """As a rule all of it is with the guest at the end: then there is nothing to look at, and True is returned."""
        with self._device.session():
            self._is_due = True
            try:
                self._connection.offer(memoryview(data))
                self._device.deliver()
            finally:
                self._is_due = False
        return not self._connection.unsent

    def _end_sending(self) -> None:
        with self._device.host():
            self._client_ended = True
            self._connection.finish_sending()
            self._look()
