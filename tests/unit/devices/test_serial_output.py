"""The output a serial port keeps for the loop: announced once, urgent in time, bounded, counted."""

from __future__ import annotations

import pytest

from asyncvmm.devices.serial_output import NEWLINE_CAP
from asyncvmm.devices.serial_state import OUTPUT_CAP
from tests.support.serial_wires import EMPTY, LSR, Wires


@pytest.fixture
def wires() -> Wires:
    return Wires()


# -- output -----------------------------------------------------------------------------------------------------------


def test_the_transmitter_is_always_empty(wires: Wires) -> None:
    assert wires.port.read(LSR) == EMPTY
    wires.send(b"x")
    assert wires.port.read(LSR) == EMPTY


def test_output_is_announced_once_until_it_is_taken(wires: Wires) -> None:
    wires.send(b"abc")
    assert wires.announced == 1
    assert wires.port.take_output() == (b"abc", (), 0)
    wires.send(b"d")
    assert wires.announced == 2


def test_a_newline_makes_output_urgent_and_announces_it_once_more(wires: Wires) -> None:
    wires.send(b"ab")
    assert not wires.port.urgent
    wires.send(b"\nc\nd")
    assert wires.port.urgent
    assert wires.announced == 2
    assert wires.port.take_output() == (b"ab\nc\nd", (1000, 1001), 0)
    assert not wires.port.urgent


def test_a_leading_newline_is_announced_only_once(wires: Wires) -> None:
    wires.send(b"\n")
    assert wires.announced == 1
    assert wires.port.urgent


def test_the_256th_pending_byte_makes_output_urgent(wires: Wires) -> None:
    wires.send(bytes(255))
    assert (wires.port.urgent, wires.announced) == (False, 1)
    wires.send(bytes(1))
    assert (wires.port.urgent, wires.announced) == (True, 2)
    wires.send(bytes(10_000))
    assert wires.announced == 2


def test_output_beyond_its_cap_is_dropped_and_counted(wires: Wires) -> None:
    wires.send(bytes(OUTPUT_CAP) + b"lost\n")
    data, newlines, lost = wires.port.take_output()
    assert (len(data), newlines, lost) == (OUTPUT_CAP, (), 5)
    wires.send(b"more")
    assert wires.port.take_output() == (b"more", (), 0)
    assert wires.port.transmitted == OUTPUT_CAP + 9


def test_newline_times_are_bounded(wires: Wires) -> None:
    wires.send(b"\n" * (NEWLINE_CAP + 100))
    data, newlines, _ = wires.port.take_output()
    assert len(data) == NEWLINE_CAP + 100
    assert len(newlines) == NEWLINE_CAP


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_dropped_bytes_are_missed_writes_and_stay_so(wires: Wires) -> None:
    wires.port.post(b"x" * (OUTPUT_CAP + 3), [])
    wires.send(b"yz")
    for _ in range(2):
        assert (wires.port.write_count, wires.port.missed_write_count) == (OUTPUT_CAP, 5)
        wires.port.take_output()
    assert wires.port.transmitted == OUTPUT_CAP + 5


def test_what_was_dropped_before_a_snapshot_is_no_write_after_it(wires: Wires) -> None:
    wires.port.post(b"x" * (OUTPUT_CAP + 3), [])
    restored = Wires(wires.port.state())
    assert (restored.port.write_count, restored.port.missed_write_count) == (OUTPUT_CAP, 3)
