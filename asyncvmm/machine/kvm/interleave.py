"""Two serial ports' output in one order: console bytes go out before the control line that the guest wrote after them.

Pure: bytes and counts in, effects out.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.effects import SerialOutput


@attrs.frozen
class Taken:
    """What one port's output buffer held: see Serial.take_output. ``first`` counts the bytes sent before ``data``."""

    data: bytes = b""
    newlines: tuple[int, ...] = ()
    lost: int = 0
    first: int = 0


def interleave(console: Taken, control: Taken, marks: Sequence[int]) -> list[SerialOutput]:
    """Effects for both ports. ``marks`` has the console's byte count at each newline in ``control``.

    Newlines beyond the recorded times and marks (a port keeps a bounded number) come last, in one piece.
    """
    effects: list[SerialOutput] = []
    sent, times_sent, start = 0, 0, 0
    for mark, time_ns in zip(marks, control.newlines, strict=False):
        upto = max(sent, min(mark - console.first, len(console.data)))
        if upto > sent:
            part = console.data[sent:upto]
            times = console.newlines[times_sent : times_sent + part.count(b"\n")]
            effects.append(SerialOutput("console", part, times))
            sent, times_sent = upto, times_sent + len(times)
        end = control.data.index(b"\n", start) + 1
        effects.append(SerialOutput("control", control.data[start:end], (time_ns,)))
        start = end
    if sent < len(console.data) or console.lost:
        effects.append(SerialOutput("console", console.data[sent:], console.newlines[times_sent:], console.lost))
    if start < len(control.data) or control.lost:
        effects.append(SerialOutput("control", control.data[start:], (), control.lost))
    return effects
