"""The network card, driven through its real transport; the backend is a list of frames."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.net import MAX_FRAME, RX, TX, VIRTIO_NET_F_MTU, GuestOffloads, VirtioNet
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.testing.driver import Driver
from tests.support.network_card import MAC, NO_HEADER, OTHER, PLAIN_FEATURES, Wire, card, frame, metrics, started

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
