"""The muxer as a state machine against a model peer: whatever both sides do in whatever order, bytes arrive in order,
credit is kept, nothing is left over; and whatever a hostile guest sends, the host stays bounded and usable."""

from __future__ import annotations

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import RX, TX
from asyncvmm.devices.virtio.vsock.muxer import MAX_CONNECTIONS, MAX_REPLIES
from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, Header
from tests.support.vsock_guest import CID, Guest, GuestKernel, Peer

PORT, HOST_PORT = 9, 5000
ROOM = 5000
NUMBERS = st.integers(0, 3)
SIZES = st.sampled_from([1, 100, 4096, 9001, 300_000])


def text(start: int, size: int) -> bytes:
    """Bytes that differ from place to place."""
    return bytes((start + number) % 251 for number in range(size))


@attrs.define
class Pair:
    """Both ends of one connection, and what each said."""

    connection: Connection
    peer: Peer
    from_host: bytearray = attrs.field(factory=bytearray)
    from_guest: bytearray = attrs.field(factory=bytearray)
    host_got: bytearray = attrs.field(factory=bytearray)
    closed: bool = False


class Conversation(RuleBasedStateMachine):
    """Hosts and guests that keep to the rules, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = GuestKernel(others=frozenset({PORT}), room=ROOM)
        self.kernel.device.muxer.backend = self
        self.pairs: list[Pair] = []
        self.requests: list[Connection] = []
        self.next_guest_port = 2000

    def requested(self, connection: Connection) -> None:
        self.requests.append(connection)

    @property
    def open_pairs(self) -> list[Pair]:
        return [pair for pair in self.pairs if not pair.closed]

    @initialize()
    def begin(self) -> None:
        self.host_connects()
        self.guest_connects(True)

    @rule()
    def another_from_the_host(self) -> None:
        self.host_connects()

    @rule(accepted=st.booleans())
    def another_from_the_guest(self, accepted: bool) -> None:
        self.guest_connects(accepted)

    def host_connects(self) -> None:
        with self.kernel.device.host() as muxer:
            connection = muxer.connect(PORT)
        self.kernel.settle()
        self.pairs.append(Pair(connection, self.kernel.peers[PORT, connection.local_port]))

    def guest_connects(self, accepted: bool) -> None:
        self.next_guest_port += 1
        peer = self.kernel.connect(self.next_guest_port, HOST_PORT)
        connection = self.requests.pop()
        with self.kernel.device.host() as muxer:
            if accepted:
                connection.accept()
                self.pairs.append(Pair(connection, peer))
            else:
                muxer.release(connection)
        self.kernel.settle()
        assert peer.established == accepted
        assert peer.over != accepted

    def pair(self, number: int) -> Pair:
        return self.open_pairs[number % len(self.open_pairs)]

    @precondition(lambda self: self.open_pairs)
    @rule(number=NUMBERS, size=SIZES)
    def host_sends(self, number: int, size: int) -> None:
        pair = self.pair(number)
        if not pair.connection.outgoing:
            data = text(len(pair.from_host), size)
            pair.from_host += data
            with self.kernel.device.host():
                pair.connection.offer(memoryview(data))

    @precondition(lambda self: self.open_pairs)
    @rule(number=NUMBERS, size=SIZES)
    def guest_sends(self, number: int, size: int) -> None:
        pair = self.pair(number)
        data = text(len(pair.from_guest), size)
        pair.from_guest += data
        pair.peer.to_send += data

    @precondition(lambda self: self.open_pairs)
    @rule(number=NUMBERS, size=SIZES)
    def host_takes(self, number: int, size: int) -> None:
        pair = self.pair(number)
        with self.kernel.device.host():
            pair.host_got += pair.connection.take(size)

    @precondition(lambda self: self.open_pairs)
    @rule(number=NUMBERS, reading=st.booleans())
    def guest_reads_or_not(self, number: int, reading: bool) -> None:
        self.pair(number).peer.reading = reading

    @rule()
    def guest_works(self) -> None:
        self.kernel.step()

    @precondition(lambda self: self.open_pairs)
    @rule(number=NUMBERS)
    def host_closes(self, number: int) -> None:
        pair = self.pair(number)
        pair.closed = True
        with self.kernel.device.host() as muxer:
            muxer.release(pair.connection)
        self.kernel.settle()
        assert pair.peer.over
        assert pair.connection.state is State.CLOSED

    @invariant()
    def nothing_is_lost_or_made_up(self) -> None:
        muxer = self.kernel.device.muxer
        assert len(muxer) == muxer.held == len(self.open_pairs)
        assert not self.kernel.driver.needs_reset
        for pair in self.open_pairs:
            assert pair.from_guest.startswith(pair.host_got + pair.connection.incoming)
            assert pair.from_host.startswith(pair.peer.got + pair.peer.buffered)
            assert len(pair.connection.incoming) <= pair.connection.buf_alloc

    def teardown(self) -> None:
        """Once everybody reads, everything arrives."""
        for pair in self.open_pairs:
            pair.peer.reading = True
        for _ in range(1000):
            moved = self.kernel.step()
            for pair in self.open_pairs:
                with self.kernel.device.host():
                    pair.host_got += pair.connection.take(1 << 20)
            if not moved and not self.kernel.step():
                break
        for pair in self.open_pairs:
            assert pair.host_got == pair.from_guest
            assert pair.peer.got == pair.from_host


Conversation.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestConversation = Conversation.TestCase

PORTS = st.sampled_from([0, 1, PORT, HOST_PORT, 1 << 30, 2**32 - 1])
CREDIT = st.sampled_from([0, 1, 100, 2**31, 2**32 - 1])
HEADERS = st.builds(
    Header,
    src_cid=st.sampled_from([CID, CID, CID, 2, 2**64 - 1]),
    dst_cid=st.sampled_from([2, 2, 2, CID]),
    src_port=PORTS,
    dst_port=PORTS,
    len=st.sampled_from([0, 1, 40, 2**32 - 1]),
    type=st.sampled_from([1, 1, 1, 2, 0xFFFF]),
    op=st.integers(0, 8),
    flags=st.sampled_from([0, 1, 2, 3, 2**32 - 1]),
    buf_alloc=CREDIT,
    fwd_cnt=CREDIT,
)


class Careless:
    """A backend that accepts every other request, and reads some."""

    def __init__(self) -> None:
        self.taken: list[Connection] = []

    def requested(self, connection: Connection) -> None:
        self.taken.append(connection)
        if len(self.taken) % 2:
            connection.accept()
        else:
            connection.abort()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(HEADERS, st.binary(min_size=1, max_size=60), st.none(), st.integers(0, 3)), max_size=60))
def test_no_packet_of_a_hostile_guest_does_harm(script: list[Header | bytes | int | None]) -> None:
    guest = Guest()
    guest.device.muxer.backend = backend = Careless()
    with guest.device.host() as muxer:
        mine = muxer.connect(PORT)
    for action in script:
        if isinstance(action, Header):
            guest.send_raw(action.encode(), bytes(40))
        elif isinstance(action, bytes):
            guest.send_raw(action)
        elif action is None:
            guest.receive()
        elif backend.taken:
            with guest.device.host() as muxer:
                connection = backend.taken[action % len(backend.taken)]
                connection.take(10)
                if connection.can_send and not connection.outgoing:
                    connection.offer(memoryview(b"x" * 100))
                if action == 3:
                    muxer.release(connection)
        assert not guest.driver.needs_reset
        assert guest.device.muxer.held <= MAX_CONNECTIONS
        assert len(guest.device.muxer._replies) <= MAX_REPLIES
    with guest.device.host() as muxer:
        for connection in (mine, *backend.taken):
            muxer.kill(connection)
            muxer.release(connection)
    guest.receive()
    assert (len(guest.device.muxer), guest.device.muxer.held) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    queue=st.sampled_from([RX, TX]),
    descriptors=st.lists(
        st.tuples(
            st.sampled_from([0, 0x100, 1 << 20, (1 << 20) + (1 << 19) - 8, 1 << 40, 2**64 - 8]),
            st.sampled_from([0, 1, 20, HEADER_SIZE, 4096, 2**32 - 1]),
            st.integers(0, 7),
            st.integers(0, 70),
        ),
        min_size=1,
        max_size=8,
    ),
    heads=st.lists(st.integers(0, 70), min_size=1, max_size=20),
)
def test_no_chain_of_a_hostile_guest_does_harm(
    queue: int, descriptors: list[tuple[int, int, int, int]], heads: list[int]
) -> None:
    guest = Guest(rx_buffers=0)
    with guest.device.host() as muxer:
        muxer.connect(PORT)
    ring = guest.driver.queue(queue)
    for index, (address, length, flags, following) in enumerate(descriptors):
        ring.set_descriptor(index, address, length, flags, following)
    for head in heads:
        ring.put_available(head)
    guest.driver.kick(queue)
    guest.driver.reset()
    guest.start()
    assert not guest.driver.needs_reset
