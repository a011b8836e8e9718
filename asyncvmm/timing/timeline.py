"""Phases of host work, nested, on one monotonic nanosecond clock. Every timing record is derived from these.

    with timeline.phase("memory"):
        with timeline.phase("memory_register"):
            ...

A phase ends when its block ends, also by an exception. Only one thread at a time may be inside a timeline's phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import attrs


@attrs.frozen
class Phase:
    """One finished phase. Times are CLOCK_MONOTONIC ns; ``parent`` is the enclosing phase's name or None."""

    name: str
    start_ns: int
    end_ns: int
    parent: str | None = None
    failed: bool = False

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from start to end."""
        return self.end_ns - self.start_ns


class Timeline:
    """The phases of one VM's life, in the order in which they ended. ``start_ns`` is the VM's time zero."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.start_ns = clock()
        self.phases: list[Phase] = []
        self._open: list[str] = []

    def phase(self, name: str) -> _OpenPhase:
        """A context manager that records the time spent in its block under ``name``."""
        return _OpenPhase(self, name)

    def durations(self) -> dict[str, int]:
        """Nanoseconds by phase name, summed over repeats."""
        sums: dict[str, int] = {}
        for phase in self.phases:
            sums[phase.name] = sums.get(phase.name, 0) + phase.duration_ns
        return sums


class _OpenPhase:
    __slots__ = ("_name", "_start_ns", "_timeline")

    def __init__(self, timeline: Timeline, name: str) -> None:
        self._timeline = timeline
        self._name = name

    def __enter__(self) -> None:
        self._timeline._open.append(self._name)
        self._start_ns = self._timeline.clock()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        timeline = self._timeline
        end_ns = timeline.clock()
        timeline._open.pop()
        parent = timeline._open[-1] if timeline._open else None
        timeline.phases.append(Phase(self._name, self._start_ns, end_ns, parent, kind is not None))
