"""A board's serial ports beside the native run loop: what it is told to answer is what they would answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.exits import io_key
from asyncvmm.machine.kvm.fastpath.binding import CONSTANT_READ, OFF, POSTED_WRITE, Fastpath, FastPort, load
from asyncvmm.machine.kvm.platform import Board, Outlets
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.machine.kvm.statistics import posted_counters
from asyncvmm.x86.layout import COM1_PORT, COM2_PORT, SERIAL_PORT_SIZE
from tests.support.serial_wires import EMPTY, FCR, IER, LCR, LSR, MCR, RBR, THR

pytestmark = pytest.mark.requires("native-library")

DATA_READY = 0x01
RECEIVED, LOOP, DLAB, FIFOS = 0x01, 0x10, 0x80, 0x01
BOTH = pytest.mark.parametrize("com", [COM1_PORT, COM2_PORT])


class Rig:
    """A board, with the native run loop or without, and the interrupts that leave it."""

    def __init__(self, fastpath: Fastpath | None, state: BoardState | None = None) -> None:
        self.on_irq: Callable[[bool], None] = lambda level: None
        self.edges: list[tuple[int, bool]] = []
        self.fastpath = fastpath
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        outlets = Outlets(
            irq=self._irq, output_pending=nothing, room=nothing, shutdown=nothing, reset=nothing, debug_exit=nothing
        )
        self.board = Board(outlets, fastpath, state)

    def _irq(self, gsi: int, level: bool) -> None:
        self.edges.append((gsi, level))
        self.on_irq(level)

    def slot(self, port: int, *, is_out: bool = False) -> FastPort | None:
        """What the native run loop would answer by."""
        assert self.fastpath is not None
        key = io_key(is_out, 1, port)
        found = [slot for slot in self.fastpath.data.port if slot.kind != OFF and slot.key == key]
        assert len(found) <= 1
        return found[0] if found else None

    def lsr(self, com: int) -> int | None:
        """What the native run loop says, None where it leaves it to Python."""
        slot = self.slot(com + LSR)
        assert slot is None or slot.kind == CONSTANT_READ
        return None if slot is None else slot.value

    def read(self, port: int) -> int:
        """As the guest, by the native run loop where it answers."""
        slot = self.slot(port) if self.fastpath is not None else None
        return self.board.bus.read(port, 1) if slot is None else slot.value

    def write(self, port: int, value: int) -> None:
        """As the guest."""
        slot = self.slot(port, is_out=True) if self.fastpath is not None else None
        if slot is None:
            self.board.bus.write(port, value, 1)
            return
        assert self.fastpath is not None
        assert slot.kind == POSTED_WRITE
        data = self.fastpath.data
        data.ring[data.used] = value
        data.used += 1
        data.newlines += value == 0x0A

    def feed(self, com: int, data: bytes) -> None:
        """As the host."""
        assert (self.board.console if com == COM1_PORT else self.board.control).feed(data) == len(data)


@contextmanager
def rigs(*boards: bool, state: BoardState | None = None) -> Iterator[list[Rig]]:
    """Boards, each with the native run loop or without."""
    library = load()
    assert library is not None
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield [Rig(Fastpath(library, event_fd) if native else None, state) for native in boards]
    finally:
        os.close(event_fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigs(True) as (only,):
        yield only


@BOTH
def test_the_idle_lsr_of_each_port_is_answered_natively(rig: Rig, com: int) -> None:
    assert rig.lsr(com) == EMPTY


@BOTH
def test_a_byte_of_the_host_shows_at_once_and_until_it_is_read(rig: Rig, com: int) -> None:
    rig.feed(com, b"ab")
    other = COM1_PORT + COM2_PORT - com
    assert (rig.lsr(com), rig.lsr(other)) == (EMPTY | DATA_READY, EMPTY)
    assert rig.read(com + RBR) == ord("a")
    assert rig.lsr(com) == EMPTY | DATA_READY
    assert rig.read(com + RBR) == ord("b")
    assert rig.lsr(com) == EMPTY


@BOTH
def test_a_byte_shows_before_its_interrupt_can_be_taken(rig: Rig, com: int) -> None:
    rig.write(com + IER, RECEIVED)
    seen: list[int | None] = []
    rig.on_irq = lambda level: seen.append(rig.lsr(com))
    rig.feed(com, b"x")
    assert seen == [EMPTY | DATA_READY]


@BOTH
def test_a_reset_of_the_fifos_shows(rig: Rig, com: int) -> None:
    rig.write(com + FCR, FIFOS)
    rig.feed(com, b"x")
    rig.write(com + FCR, FIFOS | 0x02)
    assert rig.lsr(com) == EMPTY


@BOTH
def test_an_overrun_is_left_to_the_device_whose_lsr_forgets_it_when_it_is_read(rig: Rig, com: int) -> None:
    rig.write(com + MCR, LOOP)
    for _ in range(2):
        rig.write(com + THR, 0x55)
    assert rig.lsr(com) is None
    assert rig.read(com + LSR) == EMPTY | DATA_READY | 0x02
    assert rig.lsr(com) == EMPTY | DATA_READY


@BOTH
def test_the_lsr_is_not_moved_by_the_divisor_latch(rig: Rig, com: int) -> None:
    rig.write(com + LCR, DLAB)
    rig.feed(com, b"x")
    assert rig.lsr(com) == EMPTY | DATA_READY


def test_what_the_console_has_posted_is_never_the_control_line_s(rig: Rig) -> None:
    assert rig.slot(COM2_PORT + THR, is_out=True) is None
    for value in b"console\n":
        rig.write(COM1_PORT + THR, value)
    rig.feed(COM2_PORT, b"x")
    for value in b"control\n":
        rig.write(COM2_PORT + THR, value)
        rig.read(COM2_PORT + LSR)
    board = rig.board
    assert board.control_marks == [len(b"console\n")]
    assert (board.control.take().data, board.console.take().data) == (b"control\n", b"console\n")


def test_native_accesses_are_counted_at_the_control_line(rig: Rig) -> None:
    assert rig.fastpath is not None
    for com, count in ((COM1_PORT, 3), (COM2_PORT, 5)):
        slot = rig.slot(com + LSR)
        assert slot is not None
        slot.count = count
    counters = posted_counters(rig.fastpath, 1_000_000)
    assert counters.total() == 8
    assert counters.at_ports(COM2_PORT, SERIAL_PORT_SIZE) == 5


@BOTH
def test_a_restored_port_is_answered_natively_as_it_was_saved(rig: Rig, com: int) -> None:
    rig.feed(com, b"xy")
    state = BoardState.of(rig.board.state().encode())
    with rigs(True, state=state) as (again,):
        assert (again.lsr(COM1_PORT), again.lsr(COM2_PORT)) == (rig.lsr(COM1_PORT), rig.lsr(COM2_PORT))
        assert bytes(again.read(com + RBR) for _ in range(2)) == b"xy"
        assert again.lsr(com) == EMPTY


COMS = st.sampled_from([COM1_PORT, COM2_PORT])
OFFSETS = st.integers(0, SERIAL_PORT_SIZE - 1)
STEPS = st.one_of(
    st.tuples(st.just("read"), COMS, st.one_of(st.just(LSR), OFFSETS), st.just(0)),
    st.tuples(st.just("write"), COMS, st.one_of(st.just(THR), OFFSETS), st.integers(0, 255)),
    st.tuples(st.just("feed"), COMS, st.integers(1, 20), st.just(0)),
)


@given(steps=st.lists(STEPS, max_size=60))
def test_a_guest_cannot_tell_whether_its_ports_are_answered_natively(steps: list[tuple[str, int, int, int]]) -> None:
    with rigs(True, False) as (native, plain):
        for what, com, where, value in steps:
            if what == "read":
                assert native.read(com + where) == plain.read(com + where)
                continue
            for one in (native, plain):
                one.write(com + where, value) if what == "write" else one.feed(com, bytes(range(where)))
        assert native.edges == plain.edges
        assert attrs.asdict(native.board.state()) == attrs.asdict(plain.board.state())
