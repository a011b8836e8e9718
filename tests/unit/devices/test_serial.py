from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.devices.serial import Serial
from asyncvmm.devices.serial_output import NEWLINE_CAP, URGENT_BYTES
from asyncvmm.devices.serial_state import BACKLOG_SIZE, FIFO_SIZE, OUTPUT_CAP, SerialState
from asyncvmm.errors import ConfigError

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DATA_READY, OVERRUN, EMPTY = 0x01, 0x02, 0x60


class Wires:
    """A serial port and what came out of it."""

    def __init__(self, state: SerialState | None = None) -> None:
        self.levels: list[bool] = []
        self.announced = 0
        self.rooms = 0
        ticks = count(1000)
        outputs = (self.levels.append, self._announce, self._room, ticks.__next__)
        self.port = Serial(*outputs) if state is None else Serial.from_state(state, *outputs)

    def _announce(self) -> None:
        self.announced += 1

    def _room(self) -> None:
        self.rooms += 1

    @property
    def level(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def send(self, data: bytes) -> None:
        for byte in data:
            self.port.write(THR, byte)

    def receive(self) -> bytes:
        """Read as a polling driver does: RBR as long as LSR shows data."""
        data = bytearray()
        while self.port.read(LSR) & DATA_READY:
            data.append(self.port.read(RBR))
        return bytes(data)


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


# -- loopback and modem status ----------------------------------------------------------------------------------------


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


def test_dropped_bytes_are_missed_writes_and_stay_so(wires: Wires) -> None:
    wires.port.post(b"x" * (OUTPUT_CAP + 3), [])
    wires.send(b"yz")
    for _ in range(2):
        assert (wires.port.write_count, wires.port.missed_write_count) == (OUTPUT_CAP, 5)
        wires.port.take_output()
    assert wires.port.transmitted == OUTPUT_CAP + 5


def test_a_read_of_an_empty_receiver_is_a_missed_one(wires: Wires) -> None:
    wires.port.read(RBR)
    wires.port.read(SCR)
    assert (wires.port.read_count, wires.port.missed_read_count) == (0, 1)


def test_an_overrun_is_an_error(wires: Wires) -> None:
    wires.port.write(MCR, 0x10)
    wires.send(b"ab")
    assert wires.port.error_count == 1
    assert wires.port.write_count == 0


def test_what_was_dropped_before_a_snapshot_is_no_write_after_it(wires: Wires) -> None:
    wires.port.post(b"x" * (OUTPUT_CAP + 3), [])
    restored = Wires(wires.port.state())
    assert (restored.port.write_count, restored.port.missed_write_count) == (OUTPUT_CAP, 3)


# -- snapshots --------------------------------------------------------------------------------------------------------


def test_a_restored_port_tells_its_line_and_its_pending_output() -> None:
    wires = Wires()
    wires.port.write(IER, 0x01)
    wires.port.feed(b"in")
    wires.send(b"out\n")
    restored = Wires(wires.port.state())
    assert restored.levels == [True]
    assert restored.announced == 1
    assert restored.port.urgent
    assert restored.port.take_output() == (b"out\n", (1000,), 0)
    assert restored.receive() == b"in"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ier": 0x10},
        {"ier": -1},
        {"lcr": "3"},
        {"mcr": True},
        {"fcr": 0x02},
        {"fcr": 0x80},
        {"fifo": bytes(17)},
        {"fifo": b"ab"},
        {"backlog": bytes(BACKLOG_SIZE + 1)},
        {"output": bytes(OUTPUT_CAP + 1)},
        {"output": "text"},
        {"thre_pending": True},
        {"overrun": 1},
        {"lost": -1},
    ],
)
def test_a_state_no_port_can_have_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SerialState(**wrong)  # type: ignore[arg-type]


class AnyGuest(RuleBasedStateMachine):
    """Whatever a guest and a host do, the port keeps its promises."""

    def __init__(self) -> None:
        super().__init__()
        self.wires = Wires()
        self.sent = bytearray()
        self.taken = bytearray()
        self.fed = bytearray()
        self.got = bytearray()
        self.announced_before_take = 0

    @property
    def port(self) -> Serial:
        return self.wires.port

    def _register(self, offset: int) -> int:
        """A register's stored value, without the side effects of reading it."""
        return int(getattr(self.port.state(), {IER: "ier", LCR: "lcr", MCR: "mcr", FCR: "fcr"}[offset]))

    def _dlab(self) -> bool:
        return bool(self._register(LCR) & 0x80)

    def _loop(self) -> bool:
        return bool(self._register(MCR) & 0x10)

    @rule(offset=st.integers(0, 7))
    def read(self, offset: int) -> None:
        if offset == RBR and not self._dlab():
            self.read_data()
        else:
            assert 0 <= self.port.read(offset) <= 255

    @rule()
    @precondition(lambda self: not self._dlab())
    def read_data(self) -> None:
        if self.port.read(LSR) & DATA_READY:
            self.got.append(self.port.read(RBR))

    @rule(offset=st.sampled_from([IER, LCR, SCR, LSR, MSR]), value=st.integers(0, 255))
    def write(self, offset: int, value: int) -> None:
        self.port.write(offset, value)

    @rule(data=st.binary(min_size=1, max_size=300) | st.sampled_from([b"\n", b"a", b"line\n"]))
    @precondition(lambda self: not self._dlab())
    def transmit(self, data: bytes) -> None:
        looped = self._loop()
        for byte in data:
            self.port.write(THR, byte)
        if looped:
            self._forget_input()
        else:
            self.sent += data

    @rule(value=st.integers(0, 255))
    def configure_fifos(self, value: int) -> None:
        self.port.write(FCR, value)
        self._forget_input()

    @rule(value=st.integers(0, 31))
    def set_modem_control(self, value: int) -> None:
        self.port.write(MCR, value)

    def _forget_input(self) -> None:
        """Input is lost, or mixed with looped bytes, by the guest's own doing: begin anew with what is left."""
        state = self.port.state()
        self.fed, self.got = bytearray(state.fifo + state.backlog), bytearray()

    @rule(data=st.binary(max_size=40) | st.just(bytes(range(256)) * 17))
    def feed(self, data: bytes) -> None:
        taken = self.port.feed(data)
        assert 0 <= taken <= len(data)
        assert taken == len(data) or len(self.port.state().backlog) >= BACKLOG_SIZE - FIFO_SIZE
        self.fed += data[:taken]

    @rule()
    def take(self) -> None:
        data, newlines, lost = self.port.take_output()
        self.taken += data
        assert lost == 0
        assert len(newlines) == data.count(b"\n")
        assert list(newlines) == sorted(newlines)
        announced = self.wires.announced - self.announced_before_take
        urgent = b"\n" in data or len(data) >= URGENT_BYTES
        assert announced == (0 if not data else 2 if urgent and data[0] != 0x0A else 1)
        self.announced_before_take = self.wires.announced

    @rule()
    def snapshot_and_restore(self) -> None:
        state = self.port.state()
        restored = Wires(state)
        assert restored.port.state() == state
        assert restored.level == self.wires.level
        assert restored.port.urgent == self.port.urgent
        self.announced_before_take = -1 if state.output[:1] not in (b"", b"\n") and restored.port.urgent else 0
        self.wires = restored

    @invariant()
    def no_byte_is_lost_or_reordered(self) -> None:
        state = self.port.state()
        assert self.taken + state.output == self.sent
        if not self._loop():
            assert self.got + state.fifo + state.backlog == self.fed

    @invariant()
    def the_line_is_a_function_of_the_pending_causes(self) -> None:
        state = self.port.state()
        causes = (
            (0x01, bool(state.fifo)),
            (0x02, state.thre_pending),
            (0x04, state.overrun),
            (0x08, bool(state.msr_changes)),
        )
        assert self.wires.level == any(state.ier & enable and pending for enable, pending in causes)

    @invariant()
    def the_line_is_told_only_when_it_changes(self) -> None:
        levels = self.wires.levels
        assert levels == [index % 2 == 0 for index in range(len(levels))]

    @invariant()
    def the_fifo_is_kept_full(self) -> None:
        state = self.port.state()
        depth = FIFO_SIZE if state.fcr & 1 else 1
        assert len(state.fifo) <= depth
        assert self._loop() or not state.backlog or len(state.fifo) == depth


AnyGuest.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestAnyGuest = AnyGuest.TestCase


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class RestoredTwin(RuleBasedStateMachine):
    """A port and one restored from its state half way answer alike ever after."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Wires()
        self.second = Wires()

    @rule()
    def restore(self) -> None:
        self.second = Wires(self.first.port.state())

    @rule(offset=st.integers(0, 7))
    def read(self, offset: int) -> None:
        assert self.first.port.read(offset) == self.second.port.read(offset)

    @rule(offset=st.integers(0, 7), value=st.integers(0, 255), times=st.integers(1, 20))
    def write(self, offset: int, value: int, times: int) -> None:
        for _ in range(times):
            self.first.port.write(offset, value)
            self.second.port.write(offset, value)

    @rule(data=st.binary(max_size=40))
    def feed(self, data: bytes) -> None:
        assert self.first.port.feed(data) == self.second.port.feed(data)

    @invariant()
    def both_are_alike(self) -> None:
        assert self.first.port.state() == self.second.port.state()
        assert self.first.level == self.second.level


TestRestoredTwin = RestoredTwin.TestCase
