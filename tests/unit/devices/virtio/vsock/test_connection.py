"""One connection: its states, and credit arithmetic both ways, around the point where the counters wrap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.vsock.connection import WRAP, Connection, ProtocolViolation, State
from asyncvmm.devices.virtio.vsock.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
    Header,
)
from tests.support.vsock_guest import CID, header

BUFFER = 1000
KEY = (1 << 30, 80)


def requested() -> Connection:
    return Connection(KEY, CID, BUFFER)


def established(*, buf_alloc: int = 500, counted: int = 0) -> Connection:
    """A connection on which ``counted`` bytes went both ways, all of them taken."""
    connection = requested()
    assert fetch(connection) == (OP_REQUEST, b"")
    connection._tx_cnt = connection._fwd_cnt = connection._sent_fwd_cnt = counted
    tell(connection, OP_RESPONSE, buf_alloc=buf_alloc, fwd_cnt=counted)
    return connection


def tell(connection: Connection, op: int, payload: bytes = b"", **fields: int) -> None:
    fields.setdefault("buf_alloc", connection._peer_buf_alloc)
    fields.setdefault("fwd_cnt", connection._peer_fwd_cnt)
    connection.receive(header(op, KEY[1], KEY[0], len(payload), **fields), payload)


def fetch(connection: Connection, space: int = 1 << 20) -> tuple[int, bytes]:
    packet = connection.next_packet(space)
    assert packet is not None
    head, payload = packet
    assert head.len == len(payload) <= space
    return head.op, bytes(payload)


def fetch_header(connection: Connection) -> Header:
    packet = connection.next_packet(0)
    assert packet is not None
    return packet[0]


def test_a_request_answered_is_a_connection() -> None:
    connection = requested()
    assert connection.is_unknown_to_guest
    assert fetch(connection) == (OP_REQUEST, b"")
    assert not connection.is_unknown_to_guest
    assert not connection.can_send
    tell(connection, OP_RESPONSE, buf_alloc=10)
    assert connection.state is State.ESTABLISHED
    assert connection.can_send
    assert connection.next_op() == 0


def test_a_request_refused_is_over() -> None:
    connection = requested()
    fetch(connection)
    tell(connection, OP_RST)
    assert connection.state is State.CLOSED
    assert connection.next_op() == 0


def test_a_guest_s_request_is_answered_once() -> None:
    connection = Connection(KEY, CID, BUFFER, header(OP_REQUEST, 80, KEY[0], buf_alloc=7))
    assert connection.next_op() == 0
    connection.accept()
    connection.accept()
    assert fetch(connection) == (OP_RESPONSE, b"")
    assert connection.next_op() == 0
    assert connection.peer_free == 7


def test_a_guest_s_request_that_is_closed_is_refused() -> None:
    connection = Connection(KEY, CID, BUFFER, header(OP_REQUEST, 80, KEY[0]))
    connection.close()
    assert fetch(connection) == (OP_RST, b"")


@given(
    counted=st.integers(0, WRAP - 1) | st.integers(WRAP - 600, WRAP - 1),
    size=st.integers(0, 2000),
    room=st.integers(0, 700),
    space=st.integers(1, 300),
)
def test_what_is_sent_never_exceeds_the_peer_s_room(counted: int, size: int, room: int, space: int) -> None:
    connection = established(buf_alloc=room, counted=counted)
    data = bytes(number % 251 for number in range(size))
    connection.offer(memoryview(data))
    sent = b""
    while connection.next_op() == OP_RW:
        sent += fetch(connection, space)[1]
    assert sent == data[:room]
    assert connection.unsent == size - len(sent)
    if size > room:
        assert fetch(connection)[0] == OP_CREDIT_REQUEST
        assert connection.next_op() == 0
        tell(connection, OP_CREDIT_UPDATE, fwd_cnt=(counted + room) % WRAP)
        assert connection.peer_free == room


def test_a_guest_that_answers_no_room_is_not_asked_again_and_again() -> None:
    connection = established(buf_alloc=0)
    connection.offer(memoryview(b"x"))
    assert fetch(connection)[0] == OP_CREDIT_REQUEST
    tell(connection, OP_CREDIT_UPDATE)
    assert connection.next_op() == 0
    tell(connection, OP_CREDIT_UPDATE, buf_alloc=1)
    assert fetch(connection) == (OP_RW, b"x")


@given(st.integers(0, WRAP - 1), st.integers(0, WRAP - 1))
def test_absurd_credit_is_no_room_or_what_it_says(buf_alloc: int, fwd_cnt: int) -> None:
    connection = established()
    tell(connection, OP_CREDIT_UPDATE, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt)
    assert 0 <= connection.peer_free <= buf_alloc


@given(
    counted=st.integers(0, WRAP - 1) | st.integers(WRAP - 3000, WRAP - 1),
    steps=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=30),
)
def test_a_guest_within_its_credit_is_never_refused_and_never_stuck(counted: int, steps: list[tuple[int, int]]) -> None:
    connection = established(counted=counted)
    sent, fwd_cnt, got = 0, counted, 0
    for send, take in steps:
        free = BUFFER - (counted + sent - fwd_cnt) % WRAP
        size = min(send, free)
        tell(connection, OP_RW, b"y" * size)
        sent += size
        assert len(connection.incoming) <= BUFFER
        got += len(connection.take(take))
        while connection.next_op():
            fwd_cnt = fetch_header(connection).fwd_cnt
    assert got + len(connection.incoming) == sent
    connection.take(BUFFER)
    while connection.next_op():
        fwd_cnt = fetch_header(connection).fwd_cnt
    assert BUFFER - (counted + sent - fwd_cnt) % WRAP > BUFFER // 2


def test_one_byte_beyond_the_credit_is_a_violation() -> None:
    connection = established()
    tell(connection, OP_RW, bytes(BUFFER))
    with pytest.raises(ProtocolViolation):
        tell(connection, OP_RW, b"1")


def test_a_credit_request_is_answered() -> None:
    connection = established()
    tell(connection, OP_CREDIT_REQUEST)
    assert fetch(connection)[0] == OP_CREDIT_UPDATE
    assert connection.next_op() == 0


def test_an_end_of_sending_follows_the_data() -> None:
    connection = established(buf_alloc=3)
    connection.offer(memoryview(b"abcd"))
    connection.finish_sending()
    assert fetch(connection) == (OP_RW, b"abc")
    assert fetch(connection)[0] == OP_CREDIT_REQUEST
    tell(connection, OP_CREDIT_UPDATE, fwd_cnt=3)
    assert fetch(connection) == (OP_RW, b"d")
    head = fetch_header(connection)
    assert (head.op, head.flags) == (OP_SHUTDOWN, SHUTDOWN_SEND)
    assert connection.next_op() == 0
    assert not connection.can_send


def test_an_end_of_receiving_is_told_once_and_what_crosses_it_is_no_violation() -> None:
    connection = established()
    connection.finish_receiving()
    connection.finish_receiving()
    head = fetch_header(connection)
    assert (head.op, head.flags) == (OP_SHUTDOWN, SHUTDOWN_RCV)
    assert connection.next_op() == 0
    tell(connection, OP_RW, b"crossed")
    assert connection.take(10) == b"crossed"
    assert connection.can_send
    connection.finish_sending()
    assert fetch_header(connection).flags == SHUTDOWN_BOTH


def test_a_close_waits_for_the_guest_s_reset() -> None:
    connection = established()
    connection.close()
    head = fetch_header(connection)
    assert (head.op, head.flags) == (OP_SHUTDOWN, SHUTDOWN_BOTH)
    tell(connection, OP_RW, b"too late")
    assert connection.state.value == "closing"
    assert not connection.incoming
    tell(connection, OP_RST)
    assert connection.state.value == "closed"
    assert connection.next_op() == 0


def test_a_guest_s_close_is_confirmed_and_what_it_sent_stays() -> None:
    connection = established()
    tell(connection, OP_RW, b"last words")
    tell(connection, OP_SHUTDOWN, flags=SHUTDOWN_BOTH)
    assert fetch(connection) == (OP_RST, b"")
    assert not connection.at_end
    assert connection.take(100) == b"last words"
    assert connection.at_end


def test_two_half_closes_are_a_close() -> None:
    connection = established()
    tell(connection, OP_SHUTDOWN, flags=SHUTDOWN_SEND)
    assert connection.at_end
    assert connection.can_send
    connection.offer(memoryview(b"never"))
    tell(connection, OP_SHUTDOWN, flags=SHUTDOWN_RCV)
    assert connection.unsent == 5
    assert fetch(connection) == (OP_RST, b"")


def test_an_offer_after_the_end_comes_to_nothing() -> None:
    connection = established()
    connection.forget()
    connection.offer(memoryview(b"late"))
    assert connection.unsent == 4
    assert not connection.outgoing
    assert connection.next_op() == 0


def test_data_after_the_end_of_sending_is_a_violation() -> None:
    connection = established()
    tell(connection, OP_SHUTDOWN, flags=SHUTDOWN_SEND)
    with pytest.raises(ProtocolViolation):
        tell(connection, OP_RW, b"more")


@pytest.mark.parametrize("op", [0, OP_REQUEST, OP_RESPONSE, 8, 0xFFFF])
def test_an_operation_out_of_place_is_a_violation(op: int) -> None:
    with pytest.raises(ProtocolViolation):
        tell(established(), op)


def test_an_answer_to_a_request_that_was_not_sent_yet_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        tell(requested(), OP_RESPONSE)


def test_an_abort_says_so_only_to_a_guest_that_knows() -> None:
    unknown, known = requested(), established()
    unknown.abort()
    known.abort()
    known.abort()
    assert unknown.next_op() == 0
    assert fetch(known) == (OP_RST, b"")
    assert known.next_op() == 0


def test_what_crosses_a_reset_is_ignored() -> None:
    connection = established()
    connection.abort()
    tell(connection, OP_RW, b"crossing")
    assert connection.next_op() == OP_RST
    tell(connection, OP_RST)
    assert connection.next_op() == 0


def test_a_sink_takes_what_it_can_and_the_rest_waits_in_its_order() -> None:
    connection, taken, told = established(), bytearray(), []
    connection.observer = lambda: told.append(len(connection.incoming))

    def sink(payload: bytes | memoryview) -> int:
        taken.extend(payload[:5])
        return min(5, len(payload))

    connection.sink = sink
    tell(connection, OP_RW, b"whole")
    assert not told
    tell(connection, OP_RW, b"largeXrest")
    tell(connection, OP_RW, b"behind")
    assert (bytes(taken), bytes(connection.incoming), told) == (b"wholelarge", b"Xrestbehind", [5, 11])
    connection.drop(5)
    tell(connection, OP_CREDIT_REQUEST)
    assert fetch_header(connection).fwd_cnt == 15
    assert connection.take(100) == b"behind"


def test_what_a_sink_takes_is_room_for_the_guest_again() -> None:
    connection = established()
    connection.sink = len
    for _ in range(3):
        tell(connection, OP_RW, bytes(BUFFER // 4))
    assert fetch(connection) == (OP_CREDIT_UPDATE, b"")


def test_data_after_the_guest_s_own_end_is_no_sink_s() -> None:
    connection = established()
    connection.sink = len
    tell(connection, OP_SHUTDOWN, flags=SHUTDOWN_SEND)
    with pytest.raises(ProtocolViolation):
        tell(connection, OP_RW, b"more")


def test_there_is_no_packet_where_nothing_is_to_be_said() -> None:
    assert established().next_packet(100) is None
