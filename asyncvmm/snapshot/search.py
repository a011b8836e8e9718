"""StreamSearch: a regular expression looked for in output without end, in bounded memory and bounded bursts of work.

The guest chooses the text and how it is cut to pieces; the pattern is the caller's, and may be a slow one. So only a
window of the newest bytes is kept, and while output pours in it is looked at every few milliseconds, not at each byte.
"""

from __future__ import annotations

import re

from asyncvmm.errors import ConfigError

WINDOW = 4096
"""Bytes behind which a match must not reach; what is longer may be missed."""

PAUSE_NS = 5_000_000
"""Least time between two looks."""

Pattern = re.Pattern[bytes]


def to_pattern(pattern: object) -> Pattern:
    """The compiled form of ``pattern``. Raises ConfigError."""
    expected = "a regular expression of bytes"
    try:
        compiled = re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError("console pattern", expected=expected, found=f"{pattern!r} ({error})") from None
    if not isinstance(compiled.pattern, bytes):
        raise ConfigError("console pattern", expected=expected, found=repr(compiled.pattern))
    if compiled.search(b""):
        raise ConfigError("console pattern", expected="one that needs text to match", found=repr(compiled.pattern))
    return compiled  # type: ignore[no-any-return]


class StreamSearch:
    """Looks for ``pattern``. ``until_ns`` is when to look again, None while there is nothing new.

    ``^`` is the stream's start, and ``$`` the end of what has come by the time of the look.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.until_ns: int | None = None
        self._pattern = pattern
        self._held = bytearray()
        self._at_start = True
        self._free_ns = 0
        self._found: bytes | None = None

    def feed(self, data: bytes, now_ns: int, *, gap: bool = False) -> None:
        """More output. ``gap``: some before it is missing, and no match reaches over it."""
        if self._found is not None:
            return
        if gap:
            self._search()
            self._held[:] = b"\0"
            self._at_start = False
        for at in range(0, len(data), WINDOW):
            self._held += data[at : at + WINDOW]
            if len(self._held) > 3 * WINDOW:
                self._search()
        if self.until_ns is None and data:
            self.until_ns = max(now_ns, self._free_ns)

    def look(self, now_ns: int) -> bytes | None:
        """What matched first, None for nothing yet."""
        if self.until_ns is not None and now_ns >= self.until_ns:
            self._search()
            self.until_ns, self._free_ns = None, now_ns + PAUSE_NS
        return self._found

    def _search(self) -> None:
        """Look, then forget all but the window. One byte before it stays, which is not matched: where the search begins
        elsewhere than at the held bytes' start, ``^`` is not true.
        """
        match = None if self._found else self._pattern.search(self._held, 0 if self._at_start else 1)
        if match:
            self._found = bytes(match.group())
            return
        surplus = len(self._held) - WINDOW
        if surplus > 0:
            del self._held[:surplus]
            self._at_start = False
