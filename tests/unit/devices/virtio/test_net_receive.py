"""Frames for the guest: headers, buffers that are too few or too small, drivers that are gone."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.net import HEADER_SIZE, MAX_FRAME, RX
from asyncvmm.testing.driver import Driver
from tests.support.network_card import CHECKED, MAC, OTHER, PLAIN_FEATURES, Wire, card, frame, metrics, started


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
