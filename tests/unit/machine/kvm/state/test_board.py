from __future__ import annotations

import threading
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.serial import LSR, THR
from asyncvmm.errors import SnapshotDamaged
from asyncvmm.machine.kvm.interleave import Taken
from asyncvmm.machine.kvm.platform import Board, Outlets
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.x86.layout import COM1_GSI, COM1_PORT, COM2_PORT, I8042_DATA_PORT, RTC_INDEX_PORT

IER, FCR, SCR = 1, 2, 7
RDI = 1


class Heard:
    """A board, and what leaves it."""

    def __init__(self, state: BoardState | None = None) -> None:
        self.edges: list[tuple[int, bool]] = []
        self.pending: list[str] = []
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        outlets = Outlets(
            irq=lambda gsi, level: self.edges.append((gsi, level)),
            output_pending=self.pending.append,
            room=nothing,
            shutdown=nothing,
            reset=nothing,
            debug_exit=nothing,
        )
        self.board = Board(outlets, None, state)

    def write(self, port: int, data: bytes) -> None:
        for byte in data:
            self.board.bus.write(port, byte, 1)

    def again(self) -> Heard:
        """The board that is restored from what is saved now."""
        return Heard(BoardState.of(self.board.state().encode()))


def test_a_new_board_and_its_restored_self_are_alike() -> None:
    first = Heard()
    assert attrs.asdict(first.again().board.state()) == attrs.asdict(first.board.state())


def test_output_that_was_not_taken_and_bytes_that_wait_are_there_again() -> None:
    first = Heard()
    first.write(COM1_PORT + THR, b"half a li")
    first.board.console.feed(b"typed")
    again = first.again()
    assert again.pending == []
    again.board.announce_output()
    assert again.pending == ["console"]
    assert again.board.console.take().data == b"half a li"
    assert bytes(again.board.bus.read(COM1_PORT, 1) for _ in range(5)) == b"typed"
    assert again.board.bus.read(COM1_PORT + LSR, 1) & 1 == 0


def test_a_line_that_was_high_is_high_without_an_edge() -> None:
    first = Heard()
    first.write(COM1_PORT + IER, bytes([RDI]))
    first.board.console.feed(b"x")
    assert first.edges == [(COM1_GSI, True)]
    again = first.again()
    assert first.board.state().high == [COM1_GSI]
    assert again.edges == []
    assert again.board.bus.read(COM1_PORT, 1) == ord("x")
    assert again.edges == [(COM1_GSI, False)]


def test_a_pressed_power_button_is_not_pressed_again() -> None:
    first = Heard()
    first.board.press_power_button()
    again = first.again()
    assert again.edges == []
    assert again.board.ged.state() == first.board.ged.state()
    again.board.press_power_button()
    assert [level for _, level in again.edges] == [True, False]


def test_the_other_devices_remember() -> None:
    first = Heard()
    first.write(RTC_INDEX_PORT, b"\x20")
    first.write(RTC_INDEX_PORT + 1, b"\x55")
    first.write(I8042_DATA_PORT + 4, b"\xd1")
    first.write(COM2_PORT + SCR, b"\x77")
    again = first.again()
    assert again.board.bus.read(RTC_INDEX_PORT + 1, 1) == 0x55
    assert again.board.bus.read(COM2_PORT + SCR, 1) == 0x77
    assert again.board.i8042.state().output_port_next


def test_both_ports_output_keeps_its_order_though_some_was_taken_before() -> None:
    first = Heard()
    first.write(COM1_PORT, b"gone")
    first.board.console.take()
    first.write(COM1_PORT, b"ab")
    first.write(COM2_PORT, b"one\n")
    first.write(COM1_PORT, b"c")
    first.write(COM2_PORT, b"two\n")
    again = first.again().board
    assert again.control_marks == [2, 3]
    assert again.console.take() == Taken(b"abc", (), 0, 0)
    assert again.control.take().data == b"one\ntwo\n"


def test_a_board_is_saved_while_its_ports_are_fed() -> None:
    heard = Heard()
    stop = threading.Event()

    def feed() -> None:
        while not stop.is_set():
            heard.board.console.feed(b"x")
            heard.board.console.take()

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for _ in range(50):
            BoardState.of(heard.board.state().encode())
    finally:
        stop.set()
        feeder.join()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("console", None),
        ("console", {}),
        ("control_marks", [1]),
        ("control_marks", [-1]),
        ("high", [5]),
        ("high", [4, 4, 4]),
        ("rtc", {"index": 300}),
        ("ged", {"pending": 77}),
    ],
)
def test_what_no_board_can_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(SnapshotDamaged):
        BoardState.of(encode({**decode(Heard().board.state().encode()), name: value}))


_PLAIN = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=20) | st.text(max_size=5)
)


@given(st.data())
def test_a_field_with_another_value_makes_a_board_or_is_refused(data: st.DataObject) -> None:
    record = decode(Heard().board.state().encode())
    name = data.draw(st.sampled_from(sorted(record)))
    inner = record[name]
    if isinstance(inner, dict):
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(_PLAIN)
    else:
        record[name] = data.draw(st.lists(_PLAIN, max_size=3))
    try:
        state = BoardState.of(encode(record))
    except SnapshotDamaged:
        return
    board = Heard(state).board
    for port in (
        *range(COM1_PORT, COM1_PORT + 8),
        *range(COM2_PORT, COM2_PORT + 8),
        I8042_DATA_PORT,
        RTC_INDEX_PORT + 1,
    ):
        board.bus.read(port, 1)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_section_are_refused(section: bytes) -> None:
    with pytest.raises(SnapshotDamaged):
        BoardState.of(section)
