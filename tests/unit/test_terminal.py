"""The status line on a real pseudo-terminal: nothing is left behind, nothing waits, nothing foreign gets through."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from asyncvmm.terminal import StatusLine, printable, status_line
from tests.support.screen import Screen, Terminal

NO_TERMINAL = 1_000_000
"""A descriptor that is not open."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


def line_of(terminal: Terminal) -> StatusLine:
    with os.fdopen(os.dup(terminal.slave), "w", encoding="utf-8") as stream:
        line = status_line(stream)
    assert line is not None
    return line


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_each_text_takes_the_place_of_the_one_before(terminal: Terminal) -> None:
    line = line_of(terminal)
    for text in ("a long one", "short", "another"):
        line.show(Text(text))
    screen = terminal.screen()
    assert screen.frames == ["a long one", "short", "another"]
    assert screen.lines == ["another"]
    line.close()
    assert terminal.screen().lines == [""]


def test_what_is_left_stands_on_a_line_of_its_own(terminal: Terminal) -> None:
    line = line_of(terminal)
    line.show(Text("working"))
    line.leave("done")
    line.close()
    line.close()
    assert terminal.screen().lines == ["done", ""]


@pytest.mark.parametrize("columns", [1, 2, 7, 20, 80])
def test_no_text_reaches_the_last_column(columns: int) -> None:
    with Terminal(columns) as terminal:
        line = line_of(terminal)
        line.show(Text("a text of more than twenty columns, 漢字 too, " * 3))
        (frame,) = terminal.screen().frames
        assert 0 < Text(frame).cell_len <= max(1, columns - 1)
        line.close()


def test_a_terminal_that_does_not_tell_its_width_has_80_columns() -> None:
    with Terminal(0) as terminal:
        line = line_of(terminal)
        line.show(Text("x" * 200))
        (frame,) = terminal.screen().frames
        assert len(frame) == 79
        line.close()


def test_colours_are_used_where_they_are_wanted_and_only_there(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured = line_of(terminal)
    coloured.show(Text("first", "cyan"))
    assert b"\x1b[36m" in terminal.output()
    monkeypatch.setenv("NO_COLOR", "1")
    coloured.close()
    before = len(terminal.output())
    plain = line_of(terminal)
    plain.show(Text("second", "cyan"))
    assert terminal.output()[before:] == b"\rsecond\x1b[K"
    plain.close()


@pytest.mark.parametrize("kind", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_go_back_gets_only_what_is_left(
    terminal: Terminal, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    line = line_of(terminal)
    line.show(Text("working", "red"))
    line.leave("done")
    line.close()
    assert terminal.output() == b"done\r\n"


def test_a_terminal_of_another_encoding_gets_what_it_understands(terminal: Terminal) -> None:
    with os.fdopen(os.dup(terminal.slave), "w", encoding="ascii") as stream:
        line = status_line(stream)
    assert line is not None
    line.show(Text("ä" * 100))
    assert set(terminal.screen().frames[0]) == {"?"}
    line.close()


# -- what is no terminal -----------------------------------------------------------------------------------------------


def test_what_is_no_terminal_has_no_line(tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as pipe, os.fdopen(read), (tmp_path / "file").open("w") as file:
        assert status_line(pipe) is None
        assert status_line(file) is None
    assert status_line(file) is None  # closed
    assert status_line(io.StringIO()) is None
    assert status_line(None) is None


# -- a terminal that gives trouble -------------------------------------------------------------------------------------


def test_a_terminal_that_takes_nothing_is_not_waited_for_nor_changed() -> None:
    with Terminal(reading=False) as terminal:
        terminal.fill()
        line = line_of(terminal)
        for _ in range(1000):
            line.show(Text("never seen"))
        line.leave("nor this")
        line.close()
        assert not fcntl.fcntl(terminal.slave, fcntl.F_GETFL) & os.O_NONBLOCK


class Trickle:
    """An output that takes a few bytes, then none, then a few more."""

    fd = NO_TERMINAL

    def __init__(self) -> None:
        self.heard = bytearray()
        self.open = False

    def write(self, data: bytearray) -> int:
        self.open = not self.open
        taken = data[: 11 if self.open else 0]
        self.heard += taken
        return len(taken)

    def close(self) -> None:
        pass


def test_a_frame_that_was_torn_is_completed_before_another_is_begun() -> None:
    trickle = Trickle()
    line = StatusLine(trickle, "utf-8")
    for number in range(100):
        line.show(Text(f"frame {number:02} of a hundred"))
    frames = Screen.of(trickle.heard).frames
    assert 10 < len(frames) < 60
    assert all(len(frame) == len("frame 00 of a hundred") for frame in frames)


def test_a_terminal_that_hangs_up_is_no_error() -> None:
    terminal = Terminal(reading=False)
    line = line_of(terminal)
    line.show(Text("before"))
    os.close(terminal.master)
    line.show(Text("after"))
    line.leave("the end")
    line.close()
    os.close(terminal.slave)


BACKGROUND = """
import fcntl, os, sys, termios, time
from rich.text import Text
from asyncvmm.terminal import status_line
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
line = status_line(sys.stderr)
line.show(Text("in front"))
line.close()
if not (child := os.fork()):
    os.setpgid(0, 0)
    line = status_line(sys.stderr)
    line.show(Text("behind"))
    line.close()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_job_in_the_background_draws_nothing(terminal: Terminal) -> None:
    command = [sys.executable, "-c", BACKGROUND]
    subprocess.run(command, stderr=terminal.slave, start_new_session=True, check=True, timeout=30)
    assert terminal.screen().frames == ["in front", ""]


# -- what a guest may say ----------------------------------------------------------------------------------------------


@given(st.text())
def test_nothing_of_a_guests_text_can_move_the_cursor(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == min(len(text), 200)
    assert Screen.of(shown.encode()).lines == [shown]


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b2J", "\x07", "\r\n", "\x00", "\u202eright to left", "\u2028", "e\u0301", "\u2764\ufe0f"]
)
def test_what_a_terminal_would_obey_becomes_spaces(text: str) -> None:
    assert not any(
        ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2028\u0301\ufe0f" for char in printable(text)
    )
