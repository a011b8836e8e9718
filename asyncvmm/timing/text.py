"""Text for people: durations in the unit they fill, and foreign text made harmless to a terminal and to a page.

Durations are in the largest unit in which they are not 0, as in the boot profile, with three digits where there are
more than whole units to tell.
"""

from __future__ import annotations

MAX_LABEL = 256
"""Characters of a foreign label that are shown."""

_UNITS = ((1_000_000, "ms"), (1_000, "us"))


def duration_text(ns: int) -> str:
    """``ns`` nanoseconds as ``2283 ms``, ``30.4 ms``, ``1.37 ms``, ``879 us`` or ``12 ns``; a minus where negative."""
    sign, size = ("-", -ns) if ns < 0 else ("", ns)
    for unit, name in _UNITS:
        if size >= unit:
            return f"{sign}{_three_digits(size, unit)} {name}"
    return f"{sign}{size} ns"


def _three_digits(size: int, unit: int) -> str:
    # Cut, not rounded: 999.9 us must not print as 1000 us. Whole numbers, for ns that a float does not hold.
    whole, rest = divmod(size, unit)
    if whole >= 100:
        return str(whole)
    digits = 2 if whole < 10 else 1
    return f"{whole}.{rest * 10**digits // unit:0{digits}d}"


def share_text(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent with one decimal; 0.0% of nothing."""
    return f"{part / whole * 100 if whole else 0.0:.1f}%"


def printable(text: str, cap: int = MAX_LABEL) -> str:
    """``text`` with what a terminal or a reader could be misled by escaped: controls, direction marks, surrogates."""
    shown = text[:cap]
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else _escape(char) for char in shown)
    return f"{shown}…" if len(text) > cap else shown


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
