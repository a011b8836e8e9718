"""A serial port's state: restored, refused, and told apart from its twin by nobody, whatever the guest does."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.devices.serial import Serial
from asyncvmm.devices.serial_output import URGENT_BYTES
from asyncvmm.devices.serial_state import BACKLOG_SIZE, FIFO_SIZE, OUTPUT_CAP, SerialState
from asyncvmm.errors import ConfigError
from tests.support.serial_wires import DATA_READY, FCR, IER, LCR, LSR, MCR, MSR, RBR, SCR, THR, Wires


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
