"""The device and its muxer through the transport, with a driver that speaks packet by packet."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import EVENT, RX, TX, VirtioVsock
from asyncvmm.devices.virtio.vsock.muxer import (
    BUFFER,
    MAX_CONNECTIONS,
    MAX_REPLIES,
    SMALL_BUFFER,
    TooManyConnections,
)
from asyncvmm.devices.virtio.vsock.packet import (
    HEADER_SIZE,
    HOST_CID,
    MAX_PAYLOAD,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
)
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import VsockMetrics
from tests.support.vsock_guest import CID, RX_BUFFER, Guest, header

PORT, HOST_PORT = 1024, 5000


@attrs.define
class Accepting:
    """A backend that takes everything, or nothing."""

    device: VirtioVsock
    willing: bool = True
    taken: list[Connection] = attrs.field(factory=list)

    def requested(self, connection: Connection) -> None:
        if self.willing:
            connection.accept()
            self.taken.append(connection)
        else:
            self.device.muxer.release(connection)


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def backend(guest: Guest) -> Iterator[Accepting]:
    guest.device.muxer.backend = backend = Accepting(guest.device)
    yield backend
    assert not guest.driver.needs_reset


def connect(guest: Guest, port: int = PORT) -> Connection:
    """A connection the host began, established."""
    with guest.device.host() as muxer:
        connection = muxer.connect(port)
    request = guest.receive_one().header
    assert request.op == OP_REQUEST
    guest.send(OP_RESPONSE, port, request.src_port)
    assert connection.state is State.ESTABLISHED
    return connection


def test_the_configuration_space_holds_the_guest_s_address(guest: Guest) -> None:
    assert guest.driver.config(0, 8) == CID.to_bytes(8, "little")


def test_a_host_connects_and_speaks_and_listens(guest: Guest) -> None:
    connection = connect(guest)
    with guest.device.host():
        connection.offer(memoryview(b"hello"))
    packet = guest.receive_one()
    assert (packet.op, packet.payload) == (OP_RW, b"hello")
    guest.send(OP_RW, PORT, connection.local_port, b"hello yourself")
    assert connection.take(100) == b"hello yourself"
    assert guest.metrics.rx_bytes_count == 5
    assert guest.metrics.tx_bytes_count == 14
    assert guest.metrics.conns_added == 1


def test_a_guest_connects(guest: Guest, backend: Accepting) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    answer = guest.receive_one().header
    assert (answer.op, answer.src_port, answer.dst_port) == (OP_RESPONSE, HOST_PORT, PORT)
    assert (answer.src_cid, answer.dst_cid, answer.buf_alloc) == (HOST_CID, CID, BUFFER)
    assert backend.taken[0].key == (HOST_PORT, PORT)


def test_a_guest_is_refused(guest: Guest, backend: Accepting) -> None:
    backend.willing = False
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    assert guest.receive_one().op == OP_RST
    assert len(guest.device.muxer) == guest.device.muxer.held == 0


def test_without_a_backend_everything_is_refused(guest: Guest) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    assert guest.receive_one().op == OP_RST


@pytest.mark.parametrize("op", [OP_RESPONSE, OP_RW, OP_SHUTDOWN, OP_CREDIT_UPDATE, 0, 99])
def test_a_packet_for_no_connection_is_reset_and_counted(guest: Guest, op: int) -> None:
    guest.send(op, PORT, HOST_PORT)
    answer = guest.receive_one().header
    assert (answer.op, answer.src_port, answer.dst_port) == (OP_RST, HOST_PORT, PORT)
    assert guest.metrics.conn_event_fails == 1


def test_a_reset_for_no_connection_is_not_answered(guest: Guest) -> None:
    guest.send(OP_RST, PORT, HOST_PORT)
    assert guest.receive() == []


def test_another_type_than_streams_is_reset(guest: Guest, backend: Accepting) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT, type=2)
    answer = guest.receive_one().header
    assert (answer.op, answer.type) == (OP_RST, 2)


@pytest.mark.parametrize(
    "fields",
    [{"src_cid": 4}, {"src_cid": 1 << 63}, {"dst_cid": 1}, {"dst_cid": CID}, {"len": 1}, {"len": 0xFFFFFFFF}],
    ids=str,
)
def test_a_packet_that_lies_about_itself_is_dropped_and_counted(
    guest: Guest, backend: Accepting, fields: dict[str, int]
) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT, b"", **fields)
    assert guest.receive() == []
    assert guest.metrics.tx_queue_event_fails == 1
    assert not backend.taken


def test_a_short_header_and_a_chain_of_the_wrong_direction_are_dropped(guest: Guest, backend: Accepting) -> None:
    guest.send_raw(bytes(HEADER_SIZE - 1))
    guest.driver.send(TX, writable=[100])
    guest.driver.send(TX, readable=[header(OP_REQUEST, PORT, HOST_PORT).encode()], writable=[1])
    guest.driver.kick(TX)
    assert [used.written for used in guest.driver.used(TX)] == [0, 0]
    assert guest.metrics.tx_queue_event_fails == 3


def test_a_header_in_pieces_is_one_header(guest: Guest, backend: Accepting) -> None:
    data = header(OP_REQUEST, PORT, HOST_PORT).encode()
    guest.send_raw(data[:1], data[1:43], data[43:])
    assert guest.receive_one().op == OP_RESPONSE


def test_the_largest_packet_is_taken_and_one_byte_more_is_not(guest: Guest, backend: Accepting) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    guest.send(OP_RW, PORT, HOST_PORT, bytes(MAX_PAYLOAD))
    guest.send(OP_RW, PORT, HOST_PORT, bytes(MAX_PAYLOAD + 1))
    assert len(backend.taken[0].incoming) == MAX_PAYLOAD
    assert guest.metrics.tx_queue_event_fails == 1


def test_a_guest_beyond_its_credit_loses_its_connection(guest: Guest, backend: Accepting) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    for _ in range(BUFFER // MAX_PAYLOAD):
        guest.send(OP_RW, PORT, HOST_PORT, bytes(MAX_PAYLOAD))
    guest.send(OP_RW, PORT, HOST_PORT, b"!")
    assert [packet.op for packet in guest.receive()] == [OP_RESPONSE, OP_RST]
    assert guest.metrics.conns_killed == guest.metrics.conns_removed == 1
    assert backend.taken[0].state is State.CLOSED


def test_receive_buffers_of_the_wrong_kind_come_back_empty_and_lose_nothing() -> None:
    guest = Guest(rx_buffers=1)
    guest.receive()
    with guest.device.host() as muxer:
        muxer.connect(PORT)
    assert guest.receive_one().op == OP_REQUEST
    with guest.device.host() as muxer:
        muxer.connect(PORT)
    assert guest.receive_one().op == OP_REQUEST
    with guest.device.host() as muxer:
        muxer.connect(PORT)
        muxer.connect(PORT)
    guest.driver.used(RX)
    guest.driver.send(RX, readable=[b"no"])
    guest.driver.send(RX, writable=[HEADER_SIZE])
    good = guest.driver.send(RX, writable=[HEADER_SIZE + 1])
    guest.driver.kick(RX)
    assert [(used.head == good, used.written) for used in guest.driver.used(RX)] == [
        (False, 0),
        (False, 0),
        (True, HEADER_SIZE),
    ]
    assert guest.metrics.rx_queue_event_fails == 2


def test_a_guest_without_receive_buffers_makes_nothing_grow() -> None:
    guest = Guest(rx_buffers=0)
    for number in range(3 * MAX_REPLIES):
        guest.driver.send(TX, readable=[header(OP_RW, number, HOST_PORT).encode()])
        guest.driver.kick(TX)
        guest.driver.used(TX)
        if guest.device.muxer.is_full:
            break
    guest.driver.kick(TX)
    assert number == MAX_REPLIES - 1
    guest.driver.send(TX, readable=[header(OP_RW, number, HOST_PORT).encode()])
    guest.driver.kick(TX)
    assert guest.driver.used(TX) == []
    guest.driver.send(RX, writable=[HEADER_SIZE + 1])
    guest.driver.kick(RX)
    assert len(guest.driver.used(TX)) == 1


def test_connections_are_bounded_and_so_is_their_memory(guest: Guest, backend: Accepting) -> None:
    for number in range(MAX_CONNECTIONS + 10):
        guest.send(OP_REQUEST, number, HOST_PORT)
    answers = [packet.header for packet in guest.receive()]
    assert [answer.op for answer in answers].count(OP_RST) == 10
    sizes = [connection.buf_alloc for connection in backend.taken]
    assert len(sizes) == MAX_CONNECTIONS
    assert sizes[0] == BUFFER
    assert sizes[-1] == SMALL_BUFFER
    assert sum(sizes) < 64 * 1024 * 1024
    with guest.device.host() as muxer, pytest.raises(TooManyConnections):
        muxer.connect(PORT)


def test_a_connection_the_guest_ended_counts_until_the_host_releases_it(guest: Guest, backend: Accepting) -> None:
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    guest.send(OP_SHUTDOWN, PORT, HOST_PORT, flags=SHUTDOWN_BOTH)
    muxer = guest.device.muxer
    assert [packet.op for packet in guest.receive()] == [OP_RESPONSE, OP_RST]
    assert (len(muxer), muxer.held) == (0, 1)
    guest.send(OP_REQUEST, PORT, HOST_PORT)
    assert (len(muxer), muxer.held) == (1, 2)
    muxer.release(backend.taken[0])
    muxer.release(backend.taken[0])
    assert (len(muxer), muxer.held) == (1, 1)


def test_connections_take_turns(guest: Guest) -> None:
    first, second = connect(guest, 1), connect(guest, 2)
    with guest.device.host():
        first.offer(memoryview(bytes(3 * RX_BUFFER)))
        second.offer(memoryview(bytes(3 * RX_BUFFER)))
    assert [packet.header.dst_port for packet in guest.receive()] == [1, 2] * 3


def test_a_reset_ends_what_the_guest_knew_and_keeps_what_it_did_not(guest: Guest) -> None:
    known = connect(guest)
    guest.driver.reset()
    with guest.device.host() as muxer:
        unknown = muxer.connect(PORT)
    guest.driver.reset()
    assert known.state is State.CLOSED
    assert unknown.state is State.REQUESTED
    guest.start()
    assert guest.receive_one().op == OP_REQUEST


def test_a_device_without_its_packet_queues_does_not_start() -> None:
    device = Guest().device
    device.queues[TX].reset()
    with pytest.raises(GuestFault):
        device.activate()


def test_a_jumping_index_is_a_fault_and_counted(guest: Guest) -> None:
    guest.driver.queue(TX).set_avail_index(300)
    guest.driver.kick(TX)
    assert guest.driver.needs_reset
    assert guest.metrics.tx_queue_event_fails == 1


def test_a_restored_guest_is_told_that_its_connections_are_gone(guest: Guest) -> None:
    connect(guest)
    guest.driver.send(EVENT, writable=[4])
    guest.driver.kick(EVENT)
    assert guest.events() == []
    state = guest.driver.transport.state()
    device = VirtioVsock(CID, VsockMetrics())
    transport = guest.driver.new_transport(device)
    transport.restore(state)
    with device.host() as muxer:
        assert len(muxer) == 0
    assert guest.events() == [bytes(4)]
    with device.host():
        pass
    assert guest.events() == []


def test_a_reset_event_waits_for_a_buffer(guest: Guest) -> None:
    guest.driver.transport.restore(guest.driver.transport.state())
    guest.driver.send(EVENT, writable=[3])
    guest.driver.kick(EVENT)
    assert [used.written for used in guest.driver.used(EVENT)] == [0]
    assert guest.metrics.ev_queue_event_fails == 1
    guest.driver.send(EVENT, writable=[8])
    guest.driver.kick(EVENT)
    assert guest.events() == [bytes(4)]


@pytest.mark.parametrize(
    "change", [{"guest_cid": -1}, {"guest_cid": "3"}, {"guest_cid": 2}, {"transport_reset": 1}], ids=str
)
def test_a_saved_state_that_cannot_be_is_refused(guest: Guest, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        guest.device.restore({**guest.device.state(), **change})
