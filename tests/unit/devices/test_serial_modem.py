"""A serial port's loopback, and the modem status that comes of it."""

from __future__ import annotations

import pytest

from tests.support.serial_wires import DATA_READY, EMPTY, FCR, IER, IIR, LSR, MCR, MSR, OVERRUN, Wires


@pytest.fixture
def wires() -> Wires:
    return Wires()


def test_in_loopback_bytes_come_back_and_none_go_out(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    wires.port.write(FCR, 0x01)
    wires.send(b"loop\n")
    assert wires.receive() == b"loop\n"
    assert wires.port.take_output() == (b"", (), 0)
    assert wires.announced == 0


def test_in_loopback_the_hosts_bytes_wait(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    assert wires.port.feed(b"host") == 4
    assert wires.receive() == b""
    wires.port.write(MCR, 0x00)
    assert wires.receive() == b"host"


def test_a_looped_overrun_keeps_the_fifo_and_reports_itself_first(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    wires.port.write(FCR, 0x01)
    wires.port.write(IER, 0x05)
    wires.send(bytes(range(17)))
    assert wires.port.read(IIR) == 0xC6
    assert wires.port.read(LSR) == EMPTY | DATA_READY | OVERRUN
    assert wires.port.read(LSR) == EMPTY | DATA_READY
    assert wires.port.read(IIR) == 0xC4
    assert wires.receive() == bytes(range(16))


def test_a_looped_overrun_without_fifos_overwrites_the_byte(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    wires.send(b"ab")
    assert wires.port.read(LSR) & OVERRUN
    assert wires.receive() == b"b"


def test_a_peer_with_its_cable_in_is_shown(wires: Wires) -> None:
    assert wires.port.read(MSR) == 0xB0


@pytest.mark.parametrize(("mcr", "inputs"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1A, 0x90)])
def test_loopback_feeds_modem_outputs_to_modem_inputs(wires: Wires, mcr: int, inputs: int) -> None:
    wires.port.write(MCR, mcr)
    assert wires.port.read(MSR) & 0xF0 == inputs


def test_a_changed_modem_input_interrupts_until_msr_is_read(wires: Wires) -> None:
    wires.port.write(IER, 0x08)
    wires.port.write(MCR, 0x1B)
    assert not wires.level
    wires.port.write(MCR, 0x1F)
    assert not wires.level, "TERI is set by the trailing edge only"
    wires.port.write(MCR, 0x19)
    assert wires.level
    assert wires.port.read(IIR) == 0x00
    assert wires.port.read(MSR) == 0xA5
    assert not wires.level
    assert wires.port.read(MSR) == 0xA0
