"""StatusLine: one line at the bottom of a terminal, written over in place, that never makes the program wait.

Each frame is one write of a carriage return, the text, and ``CSI K`` (erase to the end of the line, ECMA-48), so that
nothing flickers. The cursor is never hidden and no mode is changed: there is nothing to restore but this line.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO
from unicodedata import category

from rich.console import Console
from rich.text import Text

from asyncvmm.errors import ConfigError
from asyncvmm.events.outputs import open_output

if TYPE_CHECKING:
    from asyncvmm.events.outputs import Output

_ERASE = "\x1b[K"
_COLUMNS = 80
_DUMB = ("", "dumb", "unknown")


class StatusLine:
    """A terminal's current line. ``live`` is false where the terminal cannot move its cursor (TERM=dumb)."""

    def __init__(self, output: Output, encoding: str) -> None:
        self.live = os.environ.get("TERM", "").lower() not in _DUMB
        self._output = output
        self._encoding = encoding
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False, emoji=False)
        self._pending = bytearray()
        self._shown = False

    def show(self, text: Text) -> None:
        """Put ``text`` there, cut to the terminal's width; not while that takes nothing, or is another job's."""
        if self.live and self._flushed() and _in_foreground(self._output.fd):
            text.truncate(self._width(), overflow="ellipsis")
            self._send(f"\r{self._styled(text)}{_ERASE}")
            self._shown = True

    def clear(self) -> None:
        """Leave the line as it was before."""
        if self._shown:
            self._shown = False
            self._send(f"\r{_ERASE}")

    def leave(self, text: str) -> None:
        """Put ``text`` there, whole, for good: what comes next comes below it."""
        self.clear()
        self._send(f"{text}\n")

    def close(self) -> None:
        """Clear the line and let the terminal go. May be called again."""
        self.clear()
        self._flushed()
        self._output.close()

    def _styled(self, text: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(text, end="", soft_wrap=True)
        return capture.get()

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self._output.fd).columns
        except OSError:
            columns = 0
        # One less than there are: a cursor beyond the last column would be on the next line.
        return max(1, (columns or _COLUMNS) - 1)

    def _send(self, text: str) -> None:
        self._pending += text.encode(self._encoding, "replace")
        self._flushed()

    def _flushed(self) -> bool:
        """Write what can be written; whether that was all. A terminal that has gone away takes everything."""
        while self._pending and self._output.fd >= 0:
            try:
                count = self._output.write(self._pending)
            except OSError:
                self._pending.clear()
                break
            if not count:
                return False
            del self._pending[:count]
        return True


def status_line(stream: TextIO | None) -> StatusLine | None:
    """The line of the terminal behind ``stream``; None if there is none, as in a pipe."""
    with suppress(ConfigError, OSError, ValueError):
        if stream is not None and stream.isatty():
            return StatusLine(open_output(stream.fileno()), stream.encoding)
    return None


def printable(text: str, most: int = 200) -> str:
    """The beginning of ``text``, with a space for all that could move a cursor, turn text round or lean on a neighbour.

    What is left are characters with a column or two of their own.
    """
    return "".join(char if char.isprintable() and category(char)[0] != "M" else " " for char in text[:most])


def _in_foreground(fd: int) -> bool:
    """Whether the shell gave the terminal to us: a job in the background draws nothing."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not our controlling terminal
        return True
