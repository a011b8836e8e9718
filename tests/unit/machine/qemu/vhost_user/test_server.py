"""The vhost-user back end with real sockets, memfds and eventfds, on both event loops; its device is the socket one."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable

import attrs
import pytest

from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import RX, TX, VirtioVsock
from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, Header
from asyncvmm.machine.qemu.vhost_user.backend import MOST_DESCRIPTORS
from asyncvmm.machine.qemu.vhost_user.message import MAX_PAYLOAD, Request
from asyncvmm.machine.qemu.vhost_user.server import VhostUserServer
from asyncvmm.metrics.groups import VsockMetrics
from tests.support.endless import EndlessDevice
from tests.support.holdings import Holdings
from tests.support.vhost_user_front import GUEST_ADDRESS, SIZE, USER_ADDRESS, FrontEnd, addresses, table
from tests.support.vsock_guest import CID, header

pytestmark = pytest.mark.anyio

PORT, HOST_PORT = 1024, 5000


@attrs.define
class Bench:
    """A server and its front end."""

    device: VirtioVsock
    server: VhostUserServer
    front: FrontEnd
    ends: list[str]
    faults: list[str] = attrs.field(factory=list)
    errors: list[Exception] = attrs.field(factory=list)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.001)

    async def until_ended(self) -> str:
        await self.until(lambda: self.ends)
        return self.ends[0]

    def say(self, op: int, guest_port: int, host_port: int, payload: bytes = b"") -> None:
        """A packet of the guest's."""
        head = header(op, guest_port, host_port, len(payload)).encode()
        self.front.queues[TX].offer([head, payload] if payload else [head], [])
        self.front.kick(TX)

    def listen(self) -> None:
        for _ in range(4):
            self.front.queues[RX].offer([], [HEADER_SIZE + 100])
        self.front.kick(RX)

    async def hear(self) -> Header:
        """The next packet for the guest."""
        await self.until(lambda: self.front.queues[RX].used_index != self.front.queues[RX].seen_used)
        (used,) = self.front.queues[RX].take_used()
        return Header.decode(used.data)

    async def connected(self) -> Connection:
        """A connection of the host's, established."""
        self.listen()
        with self.device.host() as muxer:
            connection = muxer.connect(PORT)
        request = await self.hear()
        assert request.op == OP_REQUEST
        self.say(OP_RESPONSE, PORT, request.src_port)
        await self.until(lambda: connection.state is State.ESTABLISHED)
        return connection


@pytest.fixture
async def bench(anyio_backend: object) -> AsyncIterator[Bench]:
    ours, theirs = socket.socketpair()
    ends: list[str] = []
    device = VirtioVsock(CID, VsockMetrics())
    faults, errors = list[str](), list[Exception]()
    server = VhostUserServer(device, ours, on_end=ends.append, gave_up=faults.append, fail=errors.append)
    bench = Bench(device, server, FrontEnd(theirs), ends, faults, errors)
    yield bench
    bench.server.close()
    bench.server.close()
    bench.front.close()


@pytest.fixture
async def started(bench: Bench) -> Bench:
    await bench.front.start()
    assert bench.server.backend.running
    return bench


async def test_features_queues_and_configuration_are_told(bench: Bench) -> None:
    (features,) = struct.unpack("<Q", await bench.front.ask(Request.GET_FEATURES))
    assert all(features >> bit & 1 for bit in (28, 29, 30, 32))
    assert await bench.front.ask(Request.GET_PROTOCOL_FEATURES) == struct.pack("<Q", 1 << 0 | 1 << 3 | 1 << 9)
    assert await bench.front.ask(Request.GET_QUEUE_NUM) == struct.pack("<Q", 3)
    asked = struct.pack("<III", 0, 8, 0) + bytes(8)
    assert await bench.front.ask(Request.GET_CONFIG, asked) == struct.pack("<IIIQ", 0, 8, 0, CID)
    beyond = struct.pack("<III", 4, 8, 0) + bytes(8)
    assert await bench.front.ask(Request.GET_CONFIG, beyond) == b""


async def test_nothing_runs_before_both_rings_do(bench: Bench) -> None:
    await bench.front.negotiate()
    await bench.front.give_memory()
    bench.front.lay_out()
    bench.front.start_ring(TX, 0)
    await bench.front.in_step()
    assert not bench.server.backend.running
    with bench.device.session() as alive:
        assert not alive


async def test_the_guest_is_answered_and_interrupted(started: Bench) -> None:
    started.listen()
    started.say(OP_RW, PORT, HOST_PORT, b"who is there?")
    answer = await started.hear()
    assert (answer.op, answer.dst_port) == (OP_RST, PORT)
    assert started.front.interrupts(RX) == started.front.interrupts(TX) == 1


async def test_a_buffer_taken_without_a_kick_moves_the_place_of_the_next_kick(bench: Bench) -> None:
    bench.front.event_idx = True
    await bench.front.start()
    await bench.connected()
    with bench.device.host() as muxer:
        muxer.connect(PORT + 1)
    await bench.hear()
    assert bench.front.queues[RX].avail_event == 2


async def test_what_was_kicked_before_the_start_is_not_lost(bench: Bench) -> None:
    await bench.front.negotiate()
    await bench.front.give_memory()
    bench.front.lay_out()
    bench.listen()
    bench.say(OP_RW, PORT, HOST_PORT, b"early")
    os.eventfd_read(bench.front.kicks[TX])
    for index in (RX, TX):
        bench.front.start_ring(index, 0)
    assert (await bench.hear()).op == OP_RST


async def test_a_pause_keeps_connections(started: Bench) -> None:
    connection = await started.connected()
    bases = [await started.front.stop_ring(index) for index in (RX, TX)]
    assert bases == [1, 1]
    assert not started.server.backend.running
    with started.device.host():
        connection.offer(memoryview(b"meanwhile"))
    await started.front.give_memory()
    for index, base in enumerate(bases):
        started.front.start_ring(index, base)
    assert (await started.hear()).op == OP_RW
    started.say(OP_RW, PORT, connection.local_port, b"back again")
    await started.until(lambda: connection.incoming == b"back again")


async def test_a_new_driver_finds_no_connections(started: Bench) -> None:
    connection = await started.connected()
    for index in (RX, TX):
        await started.front.stop_ring(index)
    started.front.lay_out()
    for index in (RX, TX):
        started.front.start_ring(index, 0)
    await started.front.in_step()
    assert connection.state is State.CLOSED
    await started.connected()


async def test_memory_mapped_anew_while_it_runs_is_used_from_then_on(started: Bench) -> None:
    connection = await started.connected()
    await started.front.give_memory()
    with started.device.host():
        connection.offer(memoryview(b"still there"))
    assert (await started.hear()).op == OP_RW


async def test_a_disabled_ring_rests(started: Bench) -> None:
    started.front.state(Request.SET_VRING_ENABLE, RX, 0)
    await started.front.in_step()
    assert not started.server.backend.running
    started.front.state(Request.SET_VRING_ENABLE, RX, 1)
    await started.front.in_step()
    assert started.server.backend.running


async def test_a_guest_that_breaks_its_ring_is_left_alone_until_its_next_driver(started: Bench) -> None:
    started.front.queues[TX].set_avail_index(SIZE + 1)
    started.front.kick(TX)
    await started.until(lambda: not started.server.backend.running)
    (fault,) = started.faults
    assert "ahead" in fault
    for index in (RX, TX):
        await started.front.stop_ring(index)
    started.front.lay_out()
    for index in (RX, TX):
        started.front.start_ring(index, 0)
    await started.connected()
    assert not started.ends


async def test_a_guest_that_kicks_again_and_again_gets_one_turn_at_a_time(anyio_backend: object) -> None:
    ours, theirs = socket.socketpair()
    device = EndlessDevice(2)
    server, front = VhostUserServer(device, ours), FrontEnd(theirs)
    await front.start()
    for index in (RX, TX):
        assert 0 < await device.calls_a_turn(lambda index=index: front.kick(index)) <= 2.5  # type: ignore[misc]
    server.close()
    front.close()


async def test_a_device_of_ours_that_is_wrong_ends_the_connection_and_is_told_of(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(index: int) -> bool:
        raise RuntimeError("wrong")

    monkeypatch.setattr(started.device, "process", wrong)
    started.front.kick(TX)
    await started.until(lambda: started.errors)
    assert [str(error) for error in started.errors] == ["wrong"]
    assert not started.ends
    assert started.front.connection.recv(1) == b""


async def test_a_message_that_we_fail_at_ends_the_connection_and_is_told_of(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started.device, "config", None)
    started.front.send(Request.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
    await started.until(lambda: started.errors)
    assert isinstance(started.errors[0], TypeError)


async def test_a_front_end_that_goes_is_noticed(started: Bench) -> None:
    connection = await started.connected()
    started.front.connection.close()
    assert "gone" in await started.until_ended()
    assert connection.state is State.CLOSED
    with started.device.host() as muxer:
        muxer.connect(PORT)


# -- a front end that a guest has taken over ---------------------------------------------------------------------------


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def pair(index: int, value: int) -> bytes:
    return struct.pack("<II", index, value)


@pytest.mark.parametrize(
    ("request_", "payload", "descriptors"),
    [
        (0, b"", 0),
        (6, bytes(16), 0),
        (2**32 - 1, b"", 0),
        (Request.SET_FEATURES, u64(1 << 26), 0),
        (Request.SET_FEATURES, b"", 0),
        (Request.SET_PROTOCOL_FEATURES, u64(1 << 1), 0),
        (Request.SET_VRING_NUM, pair(2, 64), 0),
        (Request.SET_VRING_NUM, pair(0, 64), 0),
        (Request.SET_VRING_BASE, pair(0, 0), 0),
        (Request.SET_VRING_ADDR, bytes(40), 0),
        (Request.SET_VRING_ENABLE, pair(2**32 - 1, 1), 0),
        (Request.GET_VRING_BASE, pair(2, 0), 0),
        (Request.SET_VRING_KICK, u64(0), 0),
        (Request.SET_VRING_KICK, u64(0), 2),
        (Request.SET_VRING_KICK, u64(1 << 8), 0),
        (Request.SET_VRING_KICK, u64(0), 1),
        (Request.SET_VRING_CALL, u64(1), 1),
        (Request.SET_VRING_ERR, u64(255), 1),
        (Request.SET_MEM_TABLE, table(), 0),
        (Request.SET_MEM_TABLE, table(), 2),
        (Request.SET_MEM_TABLE, table(), 1),
        (Request.GET_CONFIG, bytes(11), 0),
        (Request.GET_CONFIG, struct.pack("<III", 0, 2**32 - 1, 0), 0),
        (Request.SET_OWNER, bytes(MAX_PAYLOAD + 1), 0),
        (Request.SET_OWNER, b"", 9),
        (Request.SET_OWNER, b"", 40),
    ],
)
async def test_a_message_that_must_not_be_ends_the_connection(
    started: Bench, request_: int, payload: bytes, descriptors: int
) -> None:
    wrong = [started.front.connection.fileno()] * descriptors  # neither memory nor eventfds
    started.front.send(request_, payload, wrong)
    assert await started.until_ended()
    assert not started.server.backend.running


@pytest.mark.parametrize(
    ("size", "offset"), [(1 << 30, 0), (1 << 20, 1 << 20), (1 << 62, 0), (1, (1 << 64) - 2)], ids=hex
)
async def test_memory_beyond_its_file_is_not_mapped(bench: Bench, size: int, offset: int) -> None:
    bench.front.send(Request.SET_MEM_TABLE, table(size, offset), [bench.front.memfd])
    assert "mapped" in await bench.until_ended()


async def test_memory_that_may_shrink_is_not_mapped(anyio_backend: object) -> None:
    ours, theirs = socket.socketpair()
    ends: list[str] = []
    server = VhostUserServer(VirtioVsock(CID, VsockMetrics()), ours, on_end=ends.append)
    front = FrontEnd(theirs, sealed=False)
    with pytest.raises(ConnectionError):
        await front.give_memory()
    assert ends == ["guest memory that may shrink"]
    server.close()
    front.close()


@pytest.mark.parametrize(
    ("size", "lift"),
    [
        (SIZE, GUEST_ADDRESS),
        (SIZE, 0),
        (SIZE, USER_ADDRESS + (1 << 20) - 64),
        (SIZE, USER_ADDRESS + 1),
        (SIZE + 1, USER_ADDRESS),
        (0, USER_ADDRESS),
        (2 * MOST_DESCRIPTORS, USER_ADDRESS),
    ],
)
async def test_a_ring_that_cannot_be_ends_the_connection(bench: Bench, size: int, lift: int) -> None:
    await bench.front.negotiate()
    await bench.front.give_memory()
    bench.front.lay_out()
    bench.front.state(Request.SET_VRING_NUM, TX, size)
    bench.front.send(Request.SET_VRING_ADDR, addresses(TX, bench.front.queues[TX], lift))
    bench.front.u64(Request.SET_VRING_KICK, TX, [bench.front.kicks[TX]])
    bench.front.state(Request.SET_VRING_ENABLE, TX, 1)
    assert "ring" in await bench.until_ended()


async def test_a_ring_started_before_it_was_described_ends_the_connection(bench: Bench) -> None:
    await bench.front.negotiate()
    bench.front.u64(Request.SET_VRING_KICK, TX, [bench.front.kicks[TX]])
    bench.front.state(Request.SET_VRING_ENABLE, TX, 1)
    assert "described" in await bench.until_ended()


async def test_a_close_leaves_nothing(anyio_backend: object) -> None:
    before = Holdings.now()  # the memory is known by its name: of its size are arenas of Python, too
    ours, theirs = socket.socketpair()
    device = VirtioVsock(CID, VsockMetrics())
    bench = Bench(device, VhostUserServer(device, ours), FrontEnd(theirs), [])
    await bench.front.start()
    await bench.connected()
    theirs.send(b"\x01\x00")
    await asyncio.sleep(0.01)
    bench.server.close()
    bench.front.close()
    bench.front.queues.clear()
    assert Holdings.now() == before
