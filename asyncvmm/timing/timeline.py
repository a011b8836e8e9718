"""Phases of host work, nested, on one monotonic nanosecond clock. Every timing record is derived from these.

    with timeline.phase("memory"):
        with timeline.phase("memory_register"):
            ...

A phase ends when its block ends, also by an exception. What a phase's direct children do not account for is its
residual, so that nothing is hidden. Only one thread at a time may be inside a timeline's phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType

import attrs


@attrs.frozen
class Phase:
    """One finished phase. Times are CLOCK_MONOTONIC ns; ``parent`` is the enclosing phase's name or None.

    ``residual_ns`` is what is left when the direct children's durations are taken off; None for a phase without any.
    """

    name: str
    start_ns: int
    end_ns: int
    parent: str | None = None
    failed: bool = False
    residual_ns: int | None = None

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from start to end."""
        return self.end_ns - self.start_ns


@attrs.frozen
class Span:
    """A phase that was timed elsewhere, with the phases inside it. CLOCK_MONOTONIC ns."""

    name: str
    start_ns: int
    end_ns: int
    children: tuple[Span, ...] = ()
    failed: bool = False


class Timeline:
    """The phases of one VM's life, in the order in which they ended. ``start_ns`` is the VM's time zero."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.start_ns = clock()
        self._phases: list[Phase] = []
        self._open: list[_OpenPhase] = []
        self._later: list[tuple[Callable[[], Iterable[Span]], _OpenPhase | None]] = []

    @property
    def phases(self) -> list[Phase]:
        """What has ended so far."""
        self._settle()
        return self._phases

    def phase(self, name: str) -> _OpenPhase:
        """A context manager that records the time spent in its block under ``name``."""
        return _OpenPhase(self, name)

    def record(self, span: Span) -> None:
        """Add what something else has timed on the same clock, as a child of the phase that is open, if any."""
        self.record_later(lambda: (span,))
        self._settle()

    def record_later(self, spans: Callable[[], Iterable[Span]]) -> None:
        """As ``record``, but worked out only when the open phase ends or somebody looks: for who has no time now."""
        self._later.append((spans, self._open[-1] if self._open else None))

    def durations(self) -> dict[str, int]:
        """Nanoseconds by phase name, summed over repeats."""
        sums: dict[str, int] = {}
        for phase in self.phases:
            sums[phase.name] = sums.get(phase.name, 0) + phase.duration_ns
        return sums

    def elapsed(self) -> dict[str, int]:
        """As ``durations``, with the phases that are open, and what they have taken so far."""
        sums, now = self.durations(), self.clock()
        for phase in self._open:
            sums[phase.name] = sums.get(phase.name, 0) + now - phase.start_ns
        return sums

    def _settle(self) -> None:
        later, self._later = self._later, []
        for spans, outer in later:
            for span in spans():
                self._record(span, outer)

    def _record(self, span: Span, outer: _OpenPhase | None) -> None:
        opened = _OpenPhase(self, span.name)
        for child in span.children:
            self._record(child, opened)
        self._add(opened.ended(span.start_ns, span.end_ns, outer, span.failed), outer)

    def _add(self, phase: Phase, outer: _OpenPhase | None) -> None:
        self._phases.append(phase)
        if outer is not None:
            outer.accounted = (outer.accounted or 0) + phase.duration_ns


class _OpenPhase:
    __slots__ = ("_timeline", "accounted", "name", "start_ns")

    def __init__(self, timeline: Timeline, name: str) -> None:
        self._timeline = timeline
        self.name = name
        self.accounted: int | None = None

    def __enter__(self) -> None:
        self.start_ns = self._timeline.clock()
        self._timeline._open.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        timeline = self._timeline
        end_ns = timeline.clock()
        timeline._settle()
        timeline._open.pop()
        outer = timeline._open[-1] if timeline._open else None
        timeline._add(self.ended(self.start_ns, end_ns, outer, kind is not None), outer)

    def ended(self, start_ns: int, end_ns: int, outer: _OpenPhase | None, failed: bool = False) -> Phase:
        residual = None if self.accounted is None else max(0, end_ns - start_ns - self.accounted)
        return Phase(self.name, start_ns, end_ns, outer.name if outer else None, failed, residual)
