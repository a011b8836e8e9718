"""Data for the guest in runs: buffers as Linux makes them are filled one after the other, others in between too."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.vsock.connection import Connection
from asyncvmm.devices.virtio.vsock.device import RX, TURN
from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, OP_RESPONSE, OP_RW, OP_SHUTDOWN, Header
from tests.support.vsock_guest import PATIENCE_S, Guest

PORT = 1024


def connect(guest: Guest, *, credit: int) -> Connection:
    """A connection the host began, established; the guest offers no buffer."""
    with guest.device.host() as muxer:
        connection = muxer.connect(PORT)
    guest.driver.send(RX, writable=[HEADER_SIZE + 1])
    guest.driver.kick(RX)
    guest.driver.used(RX)
    guest.send(OP_RESPONSE, PORT, connection.local_port, buf_alloc=credit)
    return connection


def packets(guest: Guest) -> list[tuple[Header, bytes]]:
    return [(Header.decode(used.data), used.data[HEADER_SIZE:]) for used in guest.driver.used(RX)]


SHAPES = ([HEADER_SIZE, 64], [HEADER_SIZE + 64], [20, HEADER_SIZE + 10], [HEADER_SIZE, 30, 30], [HEADER_SIZE + 1])


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=20),
    size=st.integers(min_value=1, max_value=1000),
    credit=st.integers(min_value=1, max_value=1000),
)
def test_data_fills_buffers_of_any_shape_in_its_order_and_never_beyond_the_credit(
    shapes: list[list[int]], size: int, credit: int
) -> None:
    guest = Guest(rx_buffers=0)
    connection = connect(guest, credit=credit)
    data = bytes(number % 251 for number in range(size))
    sent = guest.metrics.rx_packets_count
    for shape in shapes:
        guest.driver.send(RX, writable=shape)
    with guest.device.host():
        connection.offer(memoryview(data))
    came = packets(guest)
    carried = b"".join(payload for head, payload in came if head.op == OP_RW)
    assert carried == data[: len(carried)]
    assert all(head.len == len(payload) for head, payload in came)
    room = sum(sum(shape) - HEADER_SIZE for shape in shapes)
    assert len(carried) == min(size, credit, room) == size - connection.unsent
    assert connection.peer_free == credit - len(carried)
    assert guest.metrics.rx_packets_count - sent == len(came)


def test_a_run_of_data_is_followed_by_what_comes_next() -> None:
    guest = Guest(rx_buffers=0)
    connection = connect(guest, credit=1000)
    for _ in range(5):
        guest.driver.send(RX, writable=[HEADER_SIZE, 10])
    with guest.device.host():
        connection.offer(memoryview(bytes(30)))
        connection.finish_sending()
    assert [head.op for head, _ in packets(guest)] == [OP_RW] * 3 + [OP_SHUTDOWN]
    assert not guest.device.muxer.has_packet


def test_a_run_is_no_longer_than_a_turn() -> None:
    guest = Guest(rx_buffers=0, queue_size=2 * TURN)
    connection, again = connect(guest, credit=1000), []
    guest.device.call_again = lambda: again.append(True)
    for _ in range(TURN + 10):
        guest.driver.send(RX, writable=[HEADER_SIZE + 1])
    with guest.device.host():
        connection.offer(memoryview(bytes(TURN + 10)))
    assert len(packets(guest)) == TURN
    assert again
    with guest.device.host():
        pass
    assert len(packets(guest)) == 10


def test_a_jump_in_the_midst_of_a_run_leaves_what_was_sent_counted() -> None:
    guest = Guest(rx_buffers=0)
    connection = connect(guest, credit=1000)
    queue = guest.driver.queue(RX)
    guest.driver.send(RX, writable=[HEADER_SIZE, 10])
    queue.set_avail(queue.avail_index % queue.size, queue.size)
    queue.set_avail_index(queue.avail_index + 1)
    with guest.device.host():
        connection.offer(memoryview(bytes(30)))
    assert guest.driver.needs_reset
    assert connection.unsent == 20


def test_an_observer_that_fails_keeps_nobody_out_of_the_device() -> None:
    guest = Guest(rx_buffers=0)
    connection = connect(guest, credit=1000)
    guest.driver.send(RX, writable=[HEADER_SIZE, 100])

    def fail() -> None:
        raise ZeroDivisionError

    connection.observer = fail
    with pytest.raises(ZeroDivisionError), guest.device.host():
        connection.offer(memoryview(b"all of it"))
    let_in = threading.Event()

    def enter() -> None:
        with guest.device.session():
            let_in.set()

    threading.Thread(target=enter, daemon=True).start()
    assert let_in.wait(PATIENCE_S)
    assert [payload for _, payload in packets(guest)] == [b"all of it"]
