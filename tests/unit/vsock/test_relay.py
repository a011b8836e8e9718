"""A relay between a connection and a socket: how many turns and calls it takes, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from asyncvmm.devices.virtio.vsock.connection import Connection
from asyncvmm.devices.virtio.vsock.device import TX
from asyncvmm.devices.virtio.vsock.packet import OP_RW, OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RCV
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.relay import AT_ONCE, Relay
from tests.support.vsock_guest import GuestKernel, header

pytestmark = pytest.mark.anyio

OTHER = 9


class Joined:
    """A connection to the guest, relayed to ``client``'s other end."""

    def __init__(self, kernel: GuestKernel, host: VsockHost, connection: Connection) -> None:
        self.kernel, self.host, self.connection = kernel, host, connection
        self.key = (connection.peer_port, connection.local_port)
        self.client, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.relay = Relay(host.device, connection, self.end, kernel.metrics)
        self.task = asyncio.create_task(self.relay.run(b"first"))

    def send(self, *payloads: bytes) -> None:
        """Packets of the guest's, all there before the device looks."""
        peer = self.kernel.peers[self.key]
        for payload in payloads:
            head = header(OP_RW, *self.key, len(payload), buf_alloc=peer.room, fwd_cnt=peer.taken)
            self.kernel.driver.send(TX, readable=[head.encode(), payload])
        self.kernel.driver.kick(TX)
        self.kernel.driver.used(TX)

    def close(self) -> None:
        self.client.close()
        self.end.close()


@pytest.fixture
async def joined(kernel: GuestKernel, host: VsockHost) -> AsyncIterator[Joined]:
    connection = await host.open(OTHER)
    joined = Joined(kernel, host, connection)
    await kernel.until(lambda: kernel.peers[joined.key].got == b"first")
    yield joined
    joined.task.cancel()
    await asyncio.wait([joined.task])
    host.release(connection)
    joined.close()


async def test_small_packets_of_one_turn_reach_the_client_before_the_loop_turns(joined: Joined) -> None:
    joined.send(b"one ", b"two ", b"three")
    assert joined.client.recv(100) == b"one two three"


async def test_a_large_packet_reaches_the_client_before_the_loop_turns(joined: Joined) -> None:
    joined.send(b"x" * AT_ONCE, b"small", b"y" * AT_ONCE)
    assert joined.client.recv(1 << 20) == b"x" * AT_ONCE + b"small" + b"y" * AT_ONCE


async def test_what_the_client_says_is_with_the_guest_in_the_turn_that_reads_it(joined: Joined) -> None:
    joined.client.send(b"hello")
    before = joined.kernel.metrics.rx_packets_count
    joined.relay._client_has_data()
    assert joined.kernel.metrics.rx_packets_count == before + 1
    await joined.kernel.until(lambda: joined.kernel.peers[joined.key].got == b"firsthello")


async def test_a_driver_that_goes_on_another_thread_ends_the_relay(joined: Joined) -> None:
    thread = threading.Thread(target=joined.kernel.driver.reset)
    thread.start()
    thread.join()
    async with asyncio.timeout(10):
        await joined.task


async def test_a_client_that_writes_more_than_the_guest_takes_waits(joined: Joined) -> None:
    peer = joined.kernel.peers[joined.key]
    peer.reading = False
    sent = 0
    for _ in range(100):
        try:
            sent += joined.client.send(bytes(65536))
        except BlockingIOError:
            await asyncio.sleep(0.001)
    assert len(peer.buffered) == peer.room < sent
    assert not joined.relay._is_reading
    peer.reading = True
    await joined.kernel.until(lambda: len(peer.got) == len(b"first") + sent)


async def test_a_guest_that_takes_no_more_hangs_up_on_the_client_and_may_still_speak(joined: Joined) -> None:
    joined.kernel.say(OP_SHUTDOWN, joined.key, joined.kernel.peers[joined.key], flags=SHUTDOWN_RCV)
    joined.client.send(b"is anybody there?")
    async with asyncio.timeout(10):
        while True:
            try:
                joined.client.send(b"?")
            except BrokenPipeError:
                break
            await asyncio.sleep(0.001)
    joined.send(b"yes")
    assert joined.client.recv(100) == b"yes"


async def test_both_ends_in_order_end_the_relay(joined: Joined) -> None:
    joined.client.shutdown(socket.SHUT_WR)
    peer = joined.kernel.peers[joined.key]
    await joined.kernel.until(lambda: peer.ended_by_host)
    assert not joined.task.done()
    joined.send(b"last words")
    joined.kernel.say(OP_SHUTDOWN, joined.key, peer, flags=SHUTDOWN_BOTH)
    async with asyncio.timeout(10):
        await joined.task
    assert joined.client.recv(100) == b"last words"
    assert joined.client.recv(100) == b""


async def test_a_client_that_broke_off_ends_the_relay_and_is_counted_once(joined: Joined) -> None:
    joined.client.close()
    joined.send(b"x" * AT_ONCE)
    async with asyncio.timeout(10):
        await joined.task
    assert joined.kernel.metrics.tx_write_fails + joined.kernel.metrics.rx_read_fails == 1


@pytest.mark.parametrize("size", [1, AT_ONCE])
async def test_what_a_client_said_before_it_went_reaches_a_guest_that_speaks_to_nobody(
    joined: Joined, size: int
) -> None:
    joined.client.send(b" and last words")
    joined.client.close()
    joined.send(b"x" * size)
    peer = joined.kernel.peers[joined.key]
    await joined.kernel.until(lambda: peer.got == b"first and last words")
    async with asyncio.timeout(10):
        await joined.task
    assert joined.kernel.metrics.tx_write_fails == 1


async def test_a_guest_is_told_that_the_client_takes_no_more_and_may_go_on_listening(joined: Joined) -> None:
    peer = joined.kernel.peers[joined.key]
    joined.client.shutdown(socket.SHUT_RD)
    for _ in range(3):
        joined.send(b"is anybody there?")
    await joined.kernel.until(lambda: peer.ended_by_host)
    assert not joined.connection.incoming
    joined.client.send(b" and second")
    await joined.kernel.until(lambda: peer.got == b"first and second")
    joined.client.close()
    async with asyncio.timeout(10):
        await joined.task
    assert joined.kernel.metrics.tx_write_fails == 1


TOO_MANY = OSError(errno.ENOSPC, "No space left on device")


class Unwatching:
    """A loop that can watch no further descriptor: as a rule since the kernel lets one user have only so many."""

    def __init__(self, loop: asyncio.AbstractEventLoop, error: Exception = TOO_MANY) -> None:
        self._loop = loop
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_writer(self, *_: object) -> None:
        raise self._error

    add_reader = add_writer


@pytest.mark.parametrize("guest_speaks", [True, False])
async def test_a_socket_that_cannot_be_watched_ends_its_relay_and_nothing_else(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, guest_speaks: bool
) -> None:
    peer = joined.kernel.peers[joined.key]
    monkeypatch.setattr(joined.relay, "_loop", Unwatching(asyncio.get_running_loop()))
    if guest_speaks:
        joined.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        joined.send(*[bytes(AT_ONCE)] * 10)
    else:
        peer.reading = False
        while joined.relay._is_reading:
            with suppress(BlockingIOError):
                joined.client.send(bytes(65536))
            await asyncio.sleep(0)
        peer.reading = True
    async with asyncio.timeout(10):
        await joined.task


async def test_a_relay_that_is_cancelled_watches_nothing_any_more(joined: Joined) -> None:
    loop = asyncio.get_running_loop()
    joined.task.cancel()
    await asyncio.wait([joined.task])
    assert not loop.remove_reader(joined.end)
    assert not loop.remove_writer(joined.end)
    joined.send(b"to nobody")
    assert joined.connection.incoming == b"to nobody"


async def test_a_turn_that_goes_wrong_is_not_the_last(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(joined.relay, "_loop", Unwatching(asyncio.get_running_loop(), RuntimeError("in use")))
        joined.relay._read(wanted=False)
        with pytest.raises(RuntimeError, match="in use"):
            joined.relay._turn()
    joined.send(b"still there?")
    assert joined.client.recv(100) == b"still there?"


async def test_a_relay_that_could_not_begin_watches_nothing_afterwards(joined: Joined) -> None:
    loop = asyncio.get_running_loop()
    joined.task.cancel()
    await asyncio.wait([joined.task])
    relay = Relay(joined.host.device, joined.connection, joined.end, joined.kernel.metrics)
    relay._loop = Unwatching(loop, RuntimeError("in use"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="in use"):
        await relay.run()
    relay._loop = loop
    relay._turn()
    assert not relay._is_reading
    assert not loop.remove_reader(joined.end)
