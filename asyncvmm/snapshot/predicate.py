"""Predicate: something that a snapshot waits for, alone or put together. What there is to wait for is in predicates.

A predicate is a recipe; ``start`` makes what follows one guest: facts go in, an outcome comes out. Pure: the time is an
argument, in ns of one monotonic clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NoReturn

import attrs

from asyncvmm.events.base import Event

# -- what goes in ------------------------------------------------------------------------------------------------------


@attrs.frozen
class ConsoleOutput:
    """The guest wrote ``data`` on its console. ``gap``: bytes before it are missing."""

    data: bytes
    gap: bool = False


@attrs.frozen
class PortWrite:
    """The guest wrote the byte ``value`` to I/O port ``port``."""

    port: int
    value: int


@attrs.frozen
class Activity:
    """``count`` grows with each sign of life; it stands at that now."""

    count: int


@attrs.frozen
class LetRun:
    """Before anybody waited, the workload was let run: its pre-exec is over."""


Fact = Event | ConsoleOutput | PortWrite | Activity | LetRun


# -- what comes out ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Met:
    """It has come; ``detail`` says what. ``t_ns`` is that of the guest's event; None if it was none."""

    detail: str
    t_ns: int | None = None


@attrs.frozen
class Waiting:
    """It has not come yet. ``until_ns``: when to look again though no fact came; None for never."""

    until_ns: int | None = None


@attrs.frozen
class Never:
    """It cannot come any more, and why."""

    why: str


Outcome = Met | Waiting | Never

WAITING = Waiting()


class Tracker(ABC):
    """Follows one guest for one predicate."""

    @abstractmethod
    def feed(self, fact: Fact, now_ns: int) -> None:
        """Take a fact. Does not raise, whatever the guest wrote."""

    @abstractmethod
    def outcome(self, now_ns: int) -> Outcome:
        """How it stands."""


class Predicate(ABC):
    """Something to wait for. Combine with ``|`` and ``&``."""

    def __or__(self, other: Predicate) -> Predicate:
        return (
            _AnyOf((*_parts(self, _AnyOf), *_parts(other, _AnyOf))) if isinstance(other, Predicate) else NotImplemented
        )

    def __and__(self, other: Predicate) -> Predicate:
        return (
            _AllOf((*_parts(self, _AllOf), *_parts(other, _AllOf))) if isinstance(other, Predicate) else NotImplemented
        )

    def __bool__(self) -> NoReturn:
        raise TypeError("predicates are combined with | and &, not with 'or' and 'and'")

    @abstractmethod
    def start(self, now_ns: int) -> Tracker:
        """Begin to follow a guest."""

    def leaves(self) -> Iterator[Predicate]:
        """The simple predicates that it is made of."""
        yield self

    @property
    def wants_pre_exec(self) -> bool:
        """Whether the pre-exec is waited for, so that PID 1 is to hold the workload there."""
        return any(leaf.wants_pre_exec for leaf in self.leaves() if leaf is not self)

    @property
    def needs_pre_exec(self) -> bool:
        """Whether it cannot come once the workload was let run."""
        tracker = self.start(0)
        tracker.feed(LetRun(), 0)
        return isinstance(tracker.outcome(0), Never)


# -- put together ------------------------------------------------------------------------------------------------------


@attrs.frozen
class _Several(Predicate):
    parts: tuple[Predicate, ...]

    def leaves(self) -> Iterator[Predicate]:
        for part in self.parts:
            yield from part.leaves()


def _parts(predicate: Predicate, kind: type[_Several]) -> tuple[Predicate, ...]:
    return predicate.parts if isinstance(predicate, kind) else (predicate,)


@attrs.frozen
class _AnyOf(_Several):
    def __str__(self) -> str:
        return " | ".join(f"({part})" if isinstance(part, _AllOf) else str(part) for part in self.parts)

    def start(self, now_ns: int) -> Tracker:
        return _AnyTracker([part.start(now_ns) for part in self.parts])


@attrs.frozen
class _AllOf(_Several):
    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, _AnyOf) else str(part) for part in self.parts)

    def start(self, now_ns: int) -> Tracker:
        return _AllTracker([part.start(now_ns) for part in self.parts])


class _Trackers(Tracker):
    def __init__(self, parts: list[Tracker]) -> None:
        self._parts = parts

    def feed(self, fact: Fact, now_ns: int) -> None:
        for part in self._parts:
            part.feed(fact, now_ns)

    def _outcomes(self, now_ns: int) -> list[Outcome]:
        return [part.outcome(now_ns) for part in self._parts]


class _AnyTracker(_Trackers):
    """The first part, in their order, that has come."""

    def outcome(self, now_ns: int) -> Outcome:
        outcomes = self._outcomes(now_ns)
        for outcome in outcomes:
            if isinstance(outcome, Met):
                return outcome
        waiting = [outcome for outcome in outcomes if isinstance(outcome, Waiting)]
        if waiting:
            return Waiting(_earliest(waiting))
        return Never(" and ".join(dict.fromkeys(outcome.why for outcome in outcomes if isinstance(outcome, Never))))


class _AllTracker(_Trackers):
    """All parts at once; it came when the last of them did."""

    def outcome(self, now_ns: int) -> Outcome:
        outcomes = self._outcomes(now_ns)
        for outcome in outcomes:
            if isinstance(outcome, Never):
                return outcome
        waiting = [outcome for outcome in outcomes if isinstance(outcome, Waiting)]
        if waiting:
            return Waiting(_earliest(waiting))
        met = [outcome for outcome in outcomes if isinstance(outcome, Met)]
        times = [outcome.t_ns for outcome in met if outcome.t_ns is not None]
        return Met(" and ".join(outcome.detail for outcome in met), max(times) if len(times) == len(met) else None)


def _earliest(waiting: list[Waiting]) -> int | None:
    return min((outcome.until_ns for outcome in waiting if outcome.until_ns is not None), default=None)
