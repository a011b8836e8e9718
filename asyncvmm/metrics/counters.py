"""What a metric is, and a group of them: plain integers that a device adds to, and a flush that says what came since.

Three kinds, as Firecracker has them: a *counter* only grows, and a flush tells the difference to the flush before; a
*store* keeps its value; an *aggregate* has the least, the greatest and the sum of microseconds, of which the first two
are stores and the sum is a counter.

A device adds with ``group.read_count += 1``. No lock: a field has one writer at a time (a device's own lock sees to
that), a flush only reads it, and what it remembers of the flush before is its own. So counters are never set back, and
no update makes more than one integer.
"""

from __future__ import annotations

from typing import Final

import attrs

Flushed = int | dict[str, int]
"""What one field of a flushed group holds: a number, or an aggregate's ``min_us``, ``max_us`` and ``sum_us``."""

_COUNTER: Final = "counter"
_STORE: Final = "store"
_AGGREGATE: Final = "aggregate"
_KIND: Final = "kind"
_MEANING: Final = "meaning"


class LatencyAggregate:
    """Microseconds: ``min_us`` and ``max_us`` of all that were recorded (0 before the first), ``sum_us`` their sum."""

    __slots__ = ("_flushed_us", "max_us", "min_us", "sum_us")

    def __init__(self) -> None:
        self.min_us = 0
        self.max_us = 0
        self.sum_us = 0
        self._flushed_us = 0

    def record(self, us: int) -> None:
        """Something took ``us`` microseconds."""
        self.sum_us += us
        if us > self.max_us:
            self.max_us = us
        if us < self.min_us or not self.min_us:  # 0 is "none yet": Firecracker's consumers know it so
            self.min_us = us

    def flush(self) -> dict[str, int]:
        """``min_us``, ``max_us``, and what ``sum_us`` grew by since the last flush."""
        before, self._flushed_us = self._flushed_us, max(self.sum_us, self._flushed_us)
        return {"min_us": self.min_us, "max_us": self.max_us, "sum_us": self._flushed_us - before}

    def begin_anew(self) -> None:
        """``sum_us`` is about to count from 0 again."""
        self._flushed_us = 0


def counter(meaning: str) -> int:
    """A field that only grows; a flush tells what it grew by."""
    return attrs.field(default=0, metadata={_KIND: _COUNTER, _MEANING: meaning})


def store(meaning: str) -> int:
    """A field that keeps its value; a flush tells it as it stands."""
    return attrs.field(default=0, metadata={_KIND: _STORE, _MEANING: meaning})


def times(meaning: str) -> dict[str, str]:
    """The metadata of a field that is a LatencyAggregate: its factory stands in the field's own definition."""
    return {_KIND: _AGGREGATE, _MEANING: meaning}


@attrs.define(eq=False)
class MetricGroup:
    """A group of metrics, by name in the order of their definition. Subclasses define the fields."""

    _flushed: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    """Each counter's value at the last flush."""

    def flush(self) -> dict[str, Flushed]:
        """Every field: a counter's growth since the last flush, a store's value, an aggregate's three numbers."""
        flushed: dict[str, Flushed] = {}
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            if kind == _AGGREGATE:
                flushed[name] = value.flush()
            elif kind == _STORE:
                flushed[name] = value
            else:
                flushed[name] = self._growth(name, value)
        return flushed

    def begin_anew(self) -> None:
        """Counters are about to count from 0 again: what they are then came since this flush."""
        self._flushed.clear()
        for name, kind in kinds(type(self)).items():
            if kind == _AGGREGATE:
                getattr(self, name).begin_anew()

    def _growth(self, name: str, total: int) -> int:
        """A total that is a sum may be looked at while its parts are on the move: a step back is none."""
        before = self._flushed.get(name, 0)
        self._flushed[name] = max(total, before)
        return self._flushed[name] - before


_KINDS: dict[type[MetricGroup], dict[str, str]] = {}


def kinds(group: type[MetricGroup]) -> dict[str, str]:
    """``counter``, ``store`` or ``aggregate`` for each field of a class of groups, in order."""
    known = _KINDS.get(group)
    if known is None:
        known = _KINDS[group] = _of_fields(group, _KIND)
    return known


def meanings(group: type[MetricGroup]) -> dict[str, str]:
    """What each field of a class of groups says, in a few words."""
    return _of_fields(group, _MEANING)


def _of_fields(group: type[MetricGroup], key: str) -> dict[str, str]:
    return {field.name: field.metadata[key] for field in attrs.fields(group) if key in field.metadata}


def added_up(flushed: list[dict[str, Flushed]]) -> dict[str, Flushed]:
    """The sum of several flushed groups of one class: numbers added, of aggregates the least and the greatest."""
    total: dict[str, Flushed] = {}
    for group in flushed:
        for name, value in group.items():
            before = total.get(name)
            if before is None:
                total[name] = dict(value) if isinstance(value, dict) else value
            elif isinstance(value, dict) and isinstance(before, dict):
                total[name] = _joined(before, value)
            elif isinstance(value, int) and isinstance(before, int):
                total[name] = before + value
    return total


def _joined(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    recorded = [entry["min_us"] for entry in (one, other) if entry["min_us"]]
    return {
        "min_us": min(recorded, default=0),
        "max_us": max(one["max_us"], other["max_us"]),
        "sum_us": one["sum_us"] + other["sum_us"],
    }
