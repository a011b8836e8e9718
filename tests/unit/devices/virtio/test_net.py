"""The network card, driven through its real transport; the backend is a list of frames."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.devices.virtio.net import (
    HEADER_SIZE,
    MAX_FRAME,
    RX,
    TX,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    GuestOffloads,
    VirtioNet,
)
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.testing.driver import Driver

MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
NO_HEADER = bytes(HEADER_SIZE)
CHECKED = bytes((2, *bytes(9)))
PLAIN_FEATURES = 1 << VIRTIO_NET_F_MAC


def frame(payload: bytes = b"x" * 50, *, source: bytes = MAC, target: bytes = OTHER) -> bytes:
    return target + source + b"\x08\x00" + payload


class Wire:
    """A backend that keeps what it is sent while it has room, and delivers what is put on it."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.left = room
        self.sent: list[bytes] = []
        self.waiting: list[bytes] = []
        self.starts: list[GuestOffloads] = []
        self.device: VirtioNet

    def start(self, offloads: GuestOffloads) -> None:
        self.starts.append(offloads)

    def receive(self) -> None:
        while self.waiting and self.device.deliver(self.waiting[0]):
            self.waiting.pop(0)

    def room(self) -> int:
        return self.left

    def send(self, packets: Sequence[bytes]) -> None:
        assert self.left > 0, "sent without room"
        self.left -= sum(map(len, packets))
        self.sent += [packet[HEADER_SIZE:] for packet in packets]

    def put(self, data: bytes) -> None:
        """The host has a frame."""
        self.waiting.append(data)
        with self.device.session() as alive:
            if alive:
                self.receive()

    def make_room(self, size: int) -> None:
        self.left = size
        for _ in range(1000):
            with self.device.session() as alive:
                if not alive or not self.device.transmit_more():
                    return
        raise AssertionError("the card never has enough")


def card(wire: Wire, *, mtu: int | None = None, offloads: bool = False) -> VirtioNet:
    wire.device = VirtioNet(MAC, wire, NetMetrics(), mtu=mtu, offloads=offloads)
    return wire.device


def started(wire: Wire, features: int | None = None, *, event_idx: bool = False, offloads: bool = False) -> Driver:
    driver = Driver(card(wire, offloads=offloads), features=features, event_idx=event_idx)
    driver.kick(RX)
    return driver


def metrics(driver: Driver) -> NetMetrics:
    found = driver.device.metrics
    assert isinstance(found, NetMetrics)
    return found


# -- configuration -----------------------------------------------------------------------------------------------------


def test_the_driver_reads_address_link_and_mtu() -> None:
    driver = Driver(card(Wire(), mtu=65520))
    assert driver.config(0, 12) == MAC + b"\x01\x00" + b"\x01\x00" + (65520).to_bytes(2, "little")
    assert driver.offered() >> VIRTIO_NET_F_MTU & 1


def test_a_pulled_cable_shows_in_the_configuration_and_interrupts() -> None:
    wire = Wire()
    driver = started(wire)
    before = driver.interrupts
    wire.device.set_link(False)
    wire.device.set_link(False)
    assert driver.config(6, 2) == b"\x00\x00"
    assert driver.interrupts == before + 1


@pytest.mark.parametrize(("mac", "mtu"), [(b"\x01" + bytes(5), None), (bytes(5), None), (MAC, 67), (MAC, 65536)])
def test_a_card_that_cannot_be_is_refused(mac: bytes, mtu: int | None) -> None:
    with pytest.raises(ConfigError):
        VirtioNet(mac, Wire(), NetMetrics(), mtu=mtu)


def test_the_backend_learns_what_the_driver_takes_before_the_first_frame() -> None:
    wire = Wire()
    driver = Driver(card(wire, offloads=True))
    wire.put(frame())
    assert wire.waiting, "nothing is delivered before the first kick"
    driver.send(RX, writable=[2000])
    driver.kick(RX)
    assert wire.starts == [GuestOffloads(True, True, True, True)]
    assert not wire.waiting


# -- from the guest ----------------------------------------------------------------------------------------------------


def test_a_frame_goes_out_without_its_header_however_it_is_cut() -> None:
    wire = Wire()
    driver = started(wire)
    data = NO_HEADER + frame()
    assert driver.request(TX, [data]) == b""
    assert driver.request(TX, [data[:3], data[3:15], data[15:20], data[20:]]) == b""
    assert wire.sent == [frame(), frame()]
    assert metrics(driver).tx_packets_count == 2
    assert metrics(driver).tx_bytes_count == 2 * len(frame())


def test_a_frame_of_another_source_is_dropped_and_counted() -> None:
    wire = Wire()
    driver = started(wire)
    driver.request(TX, [NO_HEADER + frame(source=OTHER)])
    assert not wire.sent
    assert metrics(driver).tx_spoofed_mac_count == 1
    assert not driver.needs_reset


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        NO_HEADER,
        NO_HEADER + frame()[:13],
        NO_HEADER + frame(bytes(MAX_FRAME - 13)),
        b"\x01" + NO_HEADER[1:] + frame(),
        b"\x01\x01" + NO_HEADER[2:] + frame(),
        b"\x00\x80" + NO_HEADER[2:] + frame(),
    ],
    ids=["one byte", "header", "short", "long", "checksum", "segments", "ecn"],
)
def test_a_malformed_frame_is_dropped_and_counted(data: bytes) -> None:
    wire = Wire()
    driver = started(wire)
    driver.request(TX, [data])
    assert not wire.sent
    assert metrics(driver).tx_malformed_frames == 1


def test_a_chain_without_anything_to_send_is_given_back() -> None:
    driver = started(Wire())
    assert driver.request(TX, writable=[100]) == b""
    assert metrics(driver).tx_malformed_frames == 1


def test_the_longest_frame_goes_out() -> None:
    wire = Wire()
    driver = started(wire)
    longest = frame(bytes(MAX_FRAME - 14))
    driver.request(TX, [NO_HEADER, longest])
    assert wire.sent == [longest]


@pytest.mark.parametrize(
    ("flags", "gso", "taken"),
    [(1, 0, True), (1, 1, True), (1, 4, True), (1, 0x81, True), (0, 1, False), (1, 3, False), (2, 0, False)],
)
def test_only_negotiated_offloads_are_taken(flags: int, gso: int, taken: bool) -> None:
    wire = Wire()
    driver = started(wire, offloads=True)
    driver.request(TX, [bytes((flags, gso)) + NO_HEADER[2:] + frame()])
    assert len(wire.sent) == taken
    without = started(Wire(), features=PLAIN_FEATURES, offloads=True)
    without.request(TX, [bytes((flags, gso)) + NO_HEADER[2:] + frame()])
    assert metrics(without).tx_malformed_frames == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_wait_in_the_guest_while_the_host_has_no_room(event_idx: bool) -> None:
    wire = Wire(room=1)
    driver = started(wire, event_idx=event_idx)
    for number in range(10):
        driver.send(TX, [NO_HEADER + frame(bytes((number,) * 50))])
    driver.kick(TX)
    assert len(wire.sent) == 1
    assert len(driver.used(TX)) == 1
    assert metrics(driver).tx_remaining_reqs_count == 9
    wire.make_room(1 << 20)
    assert [data[14] for data in wire.sent] == list(range(10))
    assert len(driver.used(TX)) == 9


def test_one_turn_takes_a_bounded_number_of_descriptors() -> None:
    wire = Wire()
    driver = Driver(card(wire), memory_size=1 << 20, queue_size=256, indirect=True)
    pieces = [NO_HEADER + frame()[:20], *(b"y" for _ in range(99))]
    for _ in range(20):
        driver.send(TX, pieces, indirect=True)
    assert driver.transport.kick(TX), "there is more"
    assert len(wire.sent) == 6
    driver.kick(TX)
    assert len(wire.sent) == 20


# -- to the guest ------------------------------------------------------------------------------------------------------


def test_a_frame_comes_in_behind_a_header_that_says_one_buffer() -> None:
    wire = Wire()
    driver = started(wire)
    driver.send(RX, writable=[12, 2000])
    driver.kick(RX)
    wire.put(frame(source=OTHER, target=MAC))
    (used,) = driver.used(RX)
    assert used.data == CHECKED + b"\x01\x00" + frame(source=OTHER, target=MAC)
    assert metrics(driver).rx_packets_count == 1


def test_a_driver_that_checks_sums_itself_gets_a_plain_header() -> None:
    wire = Wire()
    driver = started(wire, features=PLAIN_FEATURES)
    driver.send(RX, writable=[2000])
    driver.kick(RX)
    wire.put(frame())
    assert driver.used(RX)[0].data == bytes(10) + b"\x01\x00" + frame()


def test_a_header_of_the_backends_is_passed_on() -> None:
    wire = Wire()
    driver = started(wire)
    driver.send(RX, writable=[2000])
    with wire.device.session():
        assert wire.device.deliver(frame(), b"\x01\x01" + bytes(8) + b"\xff\xff")
    assert driver.used(RX)[0].data == b"\x01\x01" + bytes(8) + b"\x01\x00" + frame()


def test_a_long_frame_takes_several_buffers_at_once() -> None:
    wire = Wire()
    driver = started(wire)
    for size in (7, 30, 40, 2000):
        driver.send(RX, writable=[size])
    wire.put(frame(bytes(range(100))))
    used = driver.used(RX)
    assert [entry.written for entry in used] == [7, 30, 40, 12 + 114 - 77]
    assert b"".join(entry.data for entry in used) == CHECKED + b"\x04\x00" + frame(bytes(range(100)))
    assert driver.dirty, "what the host wrote is said"


@pytest.mark.parametrize("pieces", [[400], [200, 200]], ids=["plain buffers", "buffers of two descriptors"])
def test_all_that_a_frame_changes_is_marked_as_written_all_round_the_ring(pieces: list[int]) -> None:
    wire = Wire()
    driver = Driver(card(wire), memory_size=1 << 15, queue_size=8)
    driver.kick(RX)
    for number in range(20):
        data = frame(bytes([number + 1]) * 900)
        for _ in range(3):
            driver.send(RX, (), pieces)
        driver.dirty.clear()
        before = bytes(driver.memory)
        wire.put(data)
        marked = {at for address, size in driver.dirty for at in range(address, address + size)}
        assert {at for at, (old, new) in enumerate(zip(before, driver.memory, strict=True)) if old != new} <= marked
        assert b"".join(used.data for used in driver.used(RX))[HEADER_SIZE:] == data


def test_without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped_and_counted() -> None:
    wire = Wire()
    driver = started(wire, features=PLAIN_FEATURES)
    driver.send(RX, writable=[100])
    driver.send(RX, writable=[100])
    wire.put(frame(bytes(100)))
    wire.put(frame(bytes(10)))
    assert [entry.written for entry in driver.used(RX)] == [12 + 24]
    assert metrics(driver).rx_fails == 1


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME + 1])
def test_a_frame_of_an_impossible_size_is_dropped_and_counted(size: int) -> None:
    wire = Wire()
    driver = started(wire)
    driver.send(RX, writable=[2000])
    wire.put(bytes(size))
    assert not wire.waiting
    assert metrics(driver).rx_fails == 1
    assert not driver.used(RX)


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_frame_waits_until_the_buffers_are_enough_and_the_driver_is_asked_to_kick(event_idx: bool) -> None:
    wire = Wire()
    driver = started(wire, event_idx=event_idx)
    for count in range(1, 5):
        driver.send(RX, writable=[40])
        driver.kick(RX)
        if count == 1:
            wire.put(frame(bytes(100)))
        if count < 4:
            assert wire.waiting
            assert not driver.used(RX)
            queue = driver.queue(RX)
            assert queue.avail_event == queue.avail_index if event_idx else not queue.used_flags
    assert not wire.waiting
    assert len(driver.used(RX)) == 4
    assert metrics(driver).no_rx_avail_buffer == 3


def test_a_ring_full_of_buffers_too_small_for_a_frame_drops_it() -> None:
    wire = Wire()
    driver = Driver(card(wire), queue_size=4)
    driver.kick(RX)
    for _ in range(4):
        driver.send(RX, writable=[20])
    wire.put(frame(bytes(100)))
    assert not wire.waiting
    assert metrics(driver).rx_fails == 1


def test_receive_buffers_of_thousands_of_descriptors_do_not_hold_the_loop() -> None:
    wire = Wire()
    driver = Driver(card(wire), indirect=True, memory_size=4 << 20)
    driver.kick(RX)
    for _ in range(4):
        driver.send(RX, writable=[1] * 900, indirect=True)
    wire.put(frame(bytes(8000)))
    assert not wire.waiting
    assert metrics(driver).rx_fails == 1
    assert not driver.needs_reset


def test_a_chain_that_is_none_makes_the_card_ask_for_a_reset() -> None:
    wire = Wire()
    driver = started(wire)
    driver.queue(RX).put_available(9999)
    wire.put(frame())
    assert driver.needs_reset
    assert wire.waiting == [frame()]


def test_nothing_is_delivered_to_a_driver_that_is_gone() -> None:
    wire = Wire()
    driver = started(wire)
    driver.send(RX, writable=[2000])
    before = bytes(driver.memory)
    driver.reset()
    wire.put(frame())
    assert bytes(driver.memory) == before
    driver.start()
    driver.send(RX, writable=[2000])
    driver.kick(RX)
    assert not wire.waiting
    assert len(wire.starts) == 2


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_restored_card_is_the_one_the_driver_knows() -> None:
    wire = Wire()
    driver = started(wire)
    driver.send(RX, writable=[2000])
    saved = driver.transport.state()
    other = Wire()
    clone = VirtioNet(OTHER, other, NetMetrics(), mtu=None)
    other.device = clone
    transport = driver.new_transport(clone)
    transport.restore(saved)
    assert clone.mac == MAC
    transport.kick(RX)
    other.put(frame())
    assert len(driver.used(RX)) == 1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"mac": "01" * 6, "mtu": 0},
        {"mac": "02" * 5, "mtu": 0},
        {"mac": 7, "mtu": 0},
        {"mac": "02" * 6, "mtu": 5},
        {"mac": "02" * 6, "mtu": 65536},
    ],
)
def test_a_saved_card_that_cannot_be_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        card(Wire()).restore(state)


# -- any driver, any wire ----------------------------------------------------------------------------------------------


class AnyDriver(RuleBasedStateMachine):
    """Every frame is received once, in order, or counted; every frame sent is sent once, in order, or counted."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire(room=500)
        self.driver = Driver(card(self.wire), queue_size=8, memory_size=1 << 17, event_idx=True)
        self.driver.kick(RX)
        self.number = 0
        self.expected_out: list[bytes] = []
        self.put: list[bytes] = []
        self.expected_in: list[bytes] = []

    def _next(self, size: int) -> bytes:
        self.number += 1
        return frame(self.number.to_bytes(4, "little") + bytes(size))

    def _full(self, queue: int) -> bool:
        """Whether another chain of two descriptors might find none."""
        offered = self.driver.queue(queue)
        return (offered.avail_index - offered.seen_used) & 0xFFFF >= 4

    @rule(size=st.integers(0, 300), cut=st.integers(1, 40), good=st.booleans(), kick=st.booleans())
    def send(self, size: int, cut: int, good: bool, kick: bool) -> None:
        if self._full(TX):
            return
        data = self._next(size) if good else frame(bytes(size), source=OTHER)
        if good:
            self.expected_out.append(data)
        packet = NO_HEADER + data
        self.driver.send(TX, [piece for piece in (packet[:cut], packet[cut:]) if piece])
        if kick:
            self.driver.kick(TX)

    @rule(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=2), kick=st.booleans())
    def offer(self, sizes: list[int], kick: bool) -> None:
        if self._full(RX):
            return
        self.driver.send(RX, writable=sizes)
        if kick:
            self.driver.kick(RX)

    @rule(size=st.integers(0, 300))
    def arrive(self, size: int) -> None:
        data = self._next(size)
        self.put.append(data)
        self.expected_in.append(data)
        self.wire.put(data)

    @rule(room=st.integers(1, 1000))
    def drain(self, room: int) -> None:
        self.wire.make_room(room)

    @rule()
    def collect(self) -> None:
        self.driver.used(TX)
        used = self.driver.used(RX)
        position = 0
        while position < len(used):
            count = int.from_bytes(b"".join(entry.data for entry in used[position:])[10:12], "little")
            group = used[position : position + count]
            assert len(group) == count, "a frame's buffers come together"
            data = b"".join(entry.data for entry in group)[HEADER_SIZE:]
            while self.expected_in.pop(0) != data:
                assert self.expected_in, "a frame that nobody put on the wire, or out of order"
            position += count

    @rule()
    def reset(self) -> None:
        self.collect()
        self.driver.reset()
        self.driver.start()
        self.expected_out = list(self.wire.sent)
        self.driver.kick(RX)

    @invariant()
    def nothing_is_invented(self) -> None:
        assert not self.driver.needs_reset
        assert self.wire.sent == self.expected_out[: len(self.wire.sent)]

    @invariant()
    def nothing_is_lost_in_silence(self) -> None:
        found = metrics(self.driver)
        assert found.rx_packets_count + found.rx_fails + len(self.wire.waiting) == len(self.put)
        assert found.tx_packets_count == len(self.wire.sent)


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
