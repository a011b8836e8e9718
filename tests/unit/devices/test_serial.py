"""A serial port's registers, FIFO and interrupts, as a driver meets them."""

from __future__ import annotations

import pytest

from asyncvmm.devices.serial_state import BACKLOG_SIZE, FIFO_SIZE
from tests.support.serial_wires import DLL, DLM, EMPTY, FCR, IER, IIR, LCR, LSR, MCR, MSR, OVERRUN, RBR, SCR, Wires


@pytest.fixture
def wires() -> Wires:
    return Wires()


# -- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fcr", [0x00, 0x01, 0xC1])
def test_bytes_fed_arrive_in_order_without_overrun(wires: Wires, fcr: int) -> None:
    data = bytes(range(256)) * 2
    wires.port.write(FCR, fcr)
    assert wires.port.feed(data) == len(data)
    assert wires.receive() == data
    assert not wires.port.read(LSR) & OVERRUN


def test_a_feed_beyond_the_backlog_is_cut_and_room_is_told_when_it_has_emptied(wires: Wires) -> None:
    wires.port.write(FCR, 0x01)
    assert wires.port.feed(bytes(BACKLOG_SIZE + 1)) == BACKLOG_SIZE
    for _ in range(BACKLOG_SIZE - FIFO_SIZE - 1):
        wires.port.read(RBR)
    assert wires.rooms == 0
    wires.port.read(RBR)
    assert wires.rooms == 1
    wires.receive()
    assert wires.rooms == 1


def test_a_feed_that_fits_does_not_cancel_the_call_an_earlier_one_waits_for(wires: Wires) -> None:
    wires.port.feed(bytes(BACKLOG_SIZE + 1))
    wires.port.read(RBR)
    assert wires.port.feed(b"a") == 1
    wires.receive()
    assert wires.rooms == 1


def test_a_feed_that_fits_asks_for_no_room_call(wires: Wires) -> None:
    wires.port.feed(b"abc")
    assert wires.receive() == b"abc"
    assert wires.rooms == 0


def test_an_empty_receiver_reads_zero(wires: Wires) -> None:
    assert wires.port.read(RBR) == 0


def test_clearing_the_receive_fifo_drops_16_bytes_and_no_more(wires: Wires) -> None:
    wires.port.write(FCR, 0x01)
    wires.port.feed(bytes(range(20)))
    wires.port.write(FCR, 0x03)
    assert wires.receive() == bytes(range(16, 20))


# -- interrupts -------------------------------------------------------------------------------------------------------


def test_received_data_interrupts_until_it_is_read(wires: Wires) -> None:
    wires.port.write(IER, 0x01)
    wires.port.feed(b"ab")
    assert wires.levels == [True]
    wires.port.read(RBR)
    assert wires.levels == [True]
    wires.port.read(RBR)
    assert wires.levels == [True, False]


def test_iir_tells_data_at_the_trigger_level_from_a_timeout_below_it(wires: Wires) -> None:
    wires.port.write(FCR, 0x81)
    wires.port.write(IER, 0x01)
    wires.port.feed(bytes(8))
    assert wires.port.read(IIR) == 0xC4
    wires.port.read(RBR)
    assert wires.port.read(IIR) == 0xCC


def test_iir_shows_no_fifos_until_they_are_enabled(wires: Wires) -> None:
    assert wires.port.read(IIR) == 0x01
    wires.port.write(FCR, 0x01)
    assert wires.port.read(IIR) == 0xC1
    wires.port.write(FCR, 0xC0)
    assert wires.port.read(IIR) == 0x01


def test_enabling_the_transmitter_interrupt_raises_it_each_time(wires: Wires) -> None:
    for _ in range(2):  # Linux takes a port that does not do this for a broken one
        wires.port.write(IER, 0x02)
        assert wires.level
        assert wires.port.read(IIR) == 0x02
        assert not wires.level
        assert wires.port.read(IIR) == 0x01
        wires.port.write(IER, 0x00)


def test_writing_ier_without_a_change_raises_nothing(wires: Wires) -> None:
    wires.port.write(IER, 0x02)
    wires.port.read(IIR)
    wires.port.write(IER, 0x02)
    assert wires.levels == [True, False]


def test_reading_iir_clears_the_transmitter_interrupt_only_when_it_shows_it(wires: Wires) -> None:
    wires.port.write(IER, 0x03)
    wires.port.feed(b"a")
    assert wires.port.read(IIR) == 0x04
    wires.port.read(RBR)
    assert wires.port.read(IIR) == 0x02
    assert wires.port.read(IIR) == 0x01


def test_a_fifo_burst_after_iir_was_read_raises_the_line_once(wires: Wires) -> None:
    wires.port.write(FCR, 0x01)
    wires.port.write(IER, 0x02)
    for _ in range(3):
        wires.port.read(IIR)
        wires.port.read(LSR)
        wires.levels.clear()
        wires.send(bytes(16))
        assert wires.levels == [True]


def test_a_driver_that_never_reads_iir_gets_an_edge_per_fill(wires: Wires) -> None:
    wires.port.write(IER, 0x02)
    wires.levels.clear()
    wires.send(b"ab")
    assert wires.levels == [False, True] * 2
    wires.port.write(FCR, 0x01)
    wires.levels.clear()
    wires.send(bytes(17))
    assert wires.levels == [False, True] * 2
    wires.port.read(LSR)
    wires.levels.clear()
    wires.send(b"a")
    assert wires.levels == [False, True]


def test_switching_fifos_off_ends_a_fifo_burst(wires: Wires) -> None:
    wires.port.write(FCR, 0x01)
    wires.port.write(IER, 0x02)
    wires.send(b"a")
    wires.port.write(FCR, 0x00)
    wires.levels.clear()
    wires.send(b"b")
    assert wires.levels == [False, True]


def test_a_burst_goes_on_after_a_restore_until_lsr_is_read(wires: Wires) -> None:
    wires.port.write(FCR, 0x01)
    wires.port.write(IER, 0x02)
    wires.send(b"a")
    restored = Wires(wires.port.state())
    restored.send(b"b")
    assert restored.levels == [True]
    restored = Wires(restored.port.state())
    restored.port.read(LSR)
    restored.send(b"c")
    assert restored.levels == [True, False, True]


def test_out2_does_not_gate_the_line(wires: Wires) -> None:
    wires.port.write(MCR, 0x00)
    wires.port.write(IER, 0x01)
    wires.port.feed(b"a")
    assert wires.level


# -- other registers --------------------------------------------------------------------------------------------------


def test_dlab_swaps_in_the_divisor_latches(wires: Wires) -> None:
    wires.port.write(LCR, 0x83)
    wires.port.write(DLL, 0x01)
    wires.port.write(DLM, 0x0A)
    assert (wires.port.read(DLL), wires.port.read(DLM)) == (0x01, 0x0A)
    wires.port.write(LCR, 0x03)
    assert wires.port.read(IER) == 0
    assert wires.port.take_output() == (b"", (), 0)


def test_dlab_keeps_a_busy_port_from_transmitting_the_divisor(wires: Wires) -> None:
    wires.send(b"a")
    wires.port.write(LCR, 0x80)
    wires.send(b"b")
    wires.port.write(LCR, 0x00)
    wires.send(b"c")
    assert wires.port.take_output()[0] == b"ac"


def test_scr_and_lcr_hold_what_was_written_and_ier_and_mcr_what_exists(wires: Wires) -> None:
    for offset, held in ((SCR, 0xFF), (LCR, 0x7F), (IER, 0x0F), (MCR, 0x1F)):
        wires.port.write(offset, held if offset == LCR else 0xFF)
        assert wires.port.read(offset) == held


def test_lsr_and_msr_ignore_writes(wires: Wires) -> None:
    wires.port.write(LSR, 0x00)
    wires.port.write(MSR, 0x00)
    assert (wires.port.read(LSR), wires.port.read(MSR)) == (EMPTY, 0xB0)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_both_ways(wires: Wires) -> None:
    wires.send(b"hello\n")
    wires.port.post(b"world\n", [1])
    wires.port.feed(b"input")
    assert wires.receive() == b"input"
    assert (wires.port.write_count, wires.port.read_count) == (12, 5)
    wires.port.take_output()
    wires.port.take_output()
    assert (wires.port.write_count, wires.port.flush_count) == (12, 1)
    assert (wires.port.missed_read_count, wires.port.missed_write_count, wires.port.error_count) == (0, 0, 0)


def test_a_read_of_an_empty_receiver_is_a_missed_one(wires: Wires) -> None:
    wires.port.read(RBR)
    wires.port.read(SCR)
    assert (wires.port.read_count, wires.port.missed_read_count) == (0, 1)


def test_an_overrun_is_an_error(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    wires.send(b"ab")
    assert wires.port.error_count == 1
    assert wires.port.write_count == 0
