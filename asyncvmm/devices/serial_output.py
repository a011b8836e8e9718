"""What the guest has written to a serial port, kept until the loop takes it: bounded, newlines with their times.

The port's caller holds its lock around every call; see serial.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

from asyncvmm.devices.serial_state import OUTPUT_CAP

NEWLINE_CAP: Final = 16384
"""Newline times kept until the loop takes them; later newlines of the same batch have none."""

URGENT_BYTES: Final = 256
"""Pending output that should not wait for a newline."""

NEWLINE: Final = 0x0A


class OutputBuffer(ABC):
    """The output of a port, which derives from it: a buffer with a call of its own would cost every byte that call.

    output_pending: told when the output turns from empty to non-empty, and when ``urgent`` turns true. clock: monotonic
    nanoseconds, read once per newline written.

    ``urgent`` is true while pending output holds a newline or is 256 bytes or more: the loop should take it now
    rather than wait for more. ``taken`` counts the bytes taken, dropped ones included, since this object was made; for
    metrics, since then: ``missed_write_count`` bytes written and dropped, ``flush_count`` takings of output.
    """

    __slots__ = (
        "_clock",
        "_lost",
        "_newlines",
        "_output",
        "_output_pending",
        "_plain_below",
        "flush_count",
        "missed_write_count",
        "taken",
        "urgent",
    )

    def __init__(self, output_pending: Callable[[], None], clock: Callable[[], int]) -> None:
        self._output_pending, self._clock = output_pending, clock
        self.taken = self.flush_count = 0
        self._plain_below = 0
        self._load_output(b"", 0)

    def _load_output(self, output: bytes, lost: int) -> None:
        """Have ``output`` pending, and ``lost`` bytes dropped after it, as if all had been written just now."""
        self._output, self._lost = bytearray(output), lost
        self.missed_write_count = lost
        newlines = min(output.count(b"\n"), NEWLINE_CAP)
        self._newlines = [self._clock() for _ in range(newlines)]
        self.urgent = bool(self._newlines) or len(self._output) >= URGENT_BYTES

    @abstractmethod
    def _find_plain_writes(self) -> None:
        """Set ``_plain_below``, the output length below which a THR write does nothing but append."""

    def _transmit(self, value: int) -> None:
        output = self._output
        if len(output) >= OUTPUT_CAP:
            self._lost += 1
            self.missed_write_count += 1
            return
        output.append(value)
        newline = value == NEWLINE
        if newline and len(self._newlines) < NEWLINE_CAP:
            self._newlines.append(self._clock())
        turned_urgent = not self.urgent and (newline or len(output) >= URGENT_BYTES)
        self.urgent = self.urgent or turned_urgent
        self._find_plain_writes()
        if turned_urgent or len(output) == 1:
            self._output_pending()

    def post(self, data: bytes, newline_ns: Sequence[int]) -> None:
        """THR writes that were kept aside, with the time of each newline. ``output_pending`` is not called."""
        room = max(0, OUTPUT_CAP - len(self._output))
        self._output += data[:room]
        dropped = len(data) - min(room, len(data))
        self._lost += dropped
        self.missed_write_count += dropped
        times = min(data.count(b"\n", 0, room), NEWLINE_CAP - len(self._newlines))
        self._newlines += newline_ns[:times]
        self.urgent = self.urgent or times > 0 or len(self._output) >= URGENT_BYTES
        self._find_plain_writes()

    @property
    def transmitted(self) -> int:
        """Bytes the guest has written, dropped ones included, since this object was made."""
        return self.taken + len(self._output) + self._lost

    @property
    def write_count(self) -> int:
        """Bytes the guest has written that were not dropped, since this object was made."""
        return self.transmitted - self.missed_write_count

    def take_output(self) -> tuple[bytes, tuple[int, ...], int]:
        """Pending output, the time of each newline in it (ns, the first 16,384), and the bytes dropped after it."""
        output, newlines, lost = self._output, self._newlines, self._lost
        self.taken += len(output) + lost
        self.flush_count += bool(output)
        self._output, self._newlines, self._lost = bytearray(), [], 0
        self.urgent = False
        self._plain_below = 0
        return bytes(output), tuple(newlines), lost
