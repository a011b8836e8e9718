"""A terminal of our own: a pseudo-terminal whose output is read all the while and shown on a screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Callable
from types import TracebackType

import attrs

_PIECES = re.compile(r"\x1b\[[0-9;]*[mK]|[\r\n]|[^\x00-\x1f\x7f-\x9f]+|.", re.DOTALL)

_MARK = b"\x1e"

PATIENCE_S = 30.0


@attrs.define
class Screen:
    """What a terminal shows of what was written to it, a list of lines. ``frames`` is every state the last line had.

    It knows carriage return, newline, ``CSI m`` and ``CSI K``. Whatever else could move its cursor is a failure.
    """

    lines: list[str] = attrs.field(factory=lambda: [""])
    frames: list[str] = attrs.field(factory=list)

    @classmethod
    def of(cls, output: bytes | bytearray) -> Screen:
        """The screen on which ``output`` was written."""
        screen, at = cls(), 0
        for piece in _PIECES.findall(output.decode()):
            if piece == "\r":
                at = 0
            elif piece == "\n":
                screen.lines.append("")
            elif piece.endswith("K") and piece.startswith("\x1b"):
                screen.lines[-1] = screen.lines[-1][:at]
                screen.frames.append(screen.lines[-1])
            elif not piece.startswith("\x1b["):
                assert piece.isprintable(), f"{piece!r} reached the terminal"
                line = screen.lines[-1]
                screen.lines[-1] = line[:at] + piece + line[at + len(piece) :]
                at += len(piece)
        return screen


class Terminal:
    """``with Terminal() as terminal``: a program writes to its ``slave``, and what it wrote is read if ``reading``."""

    def __init__(self, columns: int = 80, reading: bool = True) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True) if reading else None
        self._heard = bytearray()

    def __enter__(self) -> Terminal:
        if self._reader:
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.slave)
        if self._reader:
            self._reader.join(PATIENCE_S)
        os.close(self.master)

    def _read(self) -> None:
        while True:
            try:
                self._heard += os.read(self.master, 65536)
            except OSError:  # every slave is closed
                return

    def fill(self) -> None:
        """Write to it until it takes no more, by a file description of our own."""
        own = os.open(f"/proc/self/fd/{self.slave}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            while True:
                os.write(own, b"x" * 4096)
        except BlockingIOError:
            os.close(own)

    def settings(self) -> list[object]:
        """The terminal's modes."""
        return list(termios.tcgetattr(self.slave))

    def output(self) -> bytes:
        """All that was written so far: it comes before a mark that is written now."""
        marks = self._heard.count(_MARK) + 1
        os.write(self.slave, _MARK)
        self._wait(lambda: self._heard.count(_MARK) == marks)
        return bytes(self._heard).replace(_MARK, b"")

    def screen(self) -> Screen:
        """What it shows now."""
        return Screen.of(self.output())

    def until(self, text: str) -> None:
        """Wait until it has been written."""
        self._wait(lambda: text.encode() in self._heard)

    def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, bytes(self._heard)
            time.sleep(0.005)
