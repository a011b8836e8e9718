"""Serial bytes to lines: LineScanner cuts a stream at its newlines, Tail remembers its end. Both in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_LINE = 4096
"""Bytes of a line that are kept."""

TAIL = 4096
"""Bytes of a stream's end that are kept."""


class Line(NamedTuple):
    """One line without its newline and trailing carriage returns.

    ``t_ns`` is the time of its newline, on whatever clock the caller feeds. ``truncated``: bytes of it are missing.
    """

    text: bytes
    t_ns: int
    truncated: bool = False


class LineScanner:
    """Cuts a byte stream into lines of at most ``max_line`` bytes; what a line has beyond that is dropped.

    How the stream is cut into chunks makes no difference to the lines. ``truncated`` counts lines with bytes missing.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self.max_line = max_line
        self.truncated = 0
        self._head = bytearray()
        self._damaged = False

    @property
    def pending(self) -> bytes:
        """The line that has no newline yet, as far as it is kept."""
        return bytes(self._head)

    def feed(self, data: bytes, newline_times: Sequence[int] = ()) -> list[Line]:
        """Take the next bytes; return the lines they complete.

        ``newline_times`` has one time for each newline in ``data``; where it is short, its last one (or 0) serves.
        """
        pieces = data.split(b"\n")
        rest = pieces.pop()
        lines = []
        if pieces:
            times = newline_times
            if len(times) < len(pieces):
                last = times[-1] if times else 0
                times = [*times, *[last] * (len(pieces) - len(times))]
            lines = [self._finish(piece, t_ns) for piece, t_ns in zip(pieces, times, strict=False)]
        self._keep(rest)
        return lines

    def gap(self) -> None:
        """Bytes were lost here: the line they belong to is not to be trusted."""
        self._damaged = True

    def flush(self, t_ns: int) -> Line | None:
        """The stream has ended: what stands after its last newline, if anything."""
        return self._finish(b"", t_ns) if self._head or self._damaged else None

    def _keep(self, piece: bytes) -> None:
        room = self.max_line - len(self._head)
        if len(piece) > room:
            self._damaged = True
            piece = piece[:room]
        self._head += piece

    def _finish(self, piece: bytes, t_ns: int) -> Line:
        if not self._head and not self._damaged and len(piece) <= self.max_line:
            return Line(piece.rstrip(b"\r"), t_ns)
        self._keep(piece)
        text, damaged = bytes(self._head).rstrip(b"\r"), self._damaged
        self._head.clear()
        self._damaged = False
        self.truncated += damaged
        return Line(text, t_ns, damaged)


class Tail:
    """The last ``size`` bytes of a stream."""

    def __init__(self, size: int = TAIL) -> None:
        self.size = size
        self._kept = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if len(data) < self.size:
            data = self._kept[len(data) - self.size :] + data
        self._kept = data[-self.size :]

    def __bytes__(self) -> bytes:
        return self._kept
