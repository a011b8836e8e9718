"""What a metric is, and a group of them: plain integers that a device adds to, and a flush that says what came since.

Three kinds, as Firecracker has them: a *counter* only grows, and a flush tells the difference to the flush before; a
*store* keeps its value; an *aggregate* has the least, the greatest and the sum of microseconds, of which the first two
are stores and the sum is a counter.

A device adds with ``group.read_count += 1``. No lock: a field has one writer at a time (a device's own lock sees to
that), a flush only reads it, and what it remembers of the flush before is its own. So counters are never set back, and
no update makes more than one integer.
"""

from __future__ import annotations

from typing import Any, Final, Literal

Kind = Literal["counter", "store", "aggregate"]

Flushed = int | dict[str, int]
"""What one field of a flushed group holds: a number, or an aggregate's ``min_us``, ``max_us`` and ``sum_us``."""


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


class Field:
    """What a field of a group is: its kind, and what it says in a few words."""

    __slots__ = ("kind", "meaning")

    def __init__(self, kind: Kind, meaning: str) -> None:
        self.kind: Final = kind
        self.meaning: Final = meaning


def counter(meaning: str) -> Any:
    """A field, an int, that only grows; a flush tells what it grew by."""
    return Field("counter", meaning)


def store(meaning: str) -> Any:
    """A field, an int, that keeps its value; a flush tells it as it stands."""
    return Field("store", meaning)


def times(meaning: str) -> Any:
    """A field that is a LatencyAggregate."""
    return Field("aggregate", meaning)


class _Fields(type):
    """Makes slots of a class's fields, and a table of them, in order.

    There are a dozen groups, imported before every boot: attrs would write code for each, for 10 ms in all.
    """

    fields: dict[str, Field]

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _Fields:
        fields = {key: value for key, value in namespace.items() if isinstance(value, Field)}
        rest = {key: value for key, value in namespace.items() if key not in fields}
        rest.setdefault("__slots__", tuple(fields))
        made = super().__new__(cls, name, bases, rest)
        made.fields = {**getattr(made, "fields", {}), **fields}
        return made


class MetricGroup(metaclass=_Fields):
    """A group of metrics, by name in the order of their definition. Subclasses define the fields:

    class UartMetrics(MetricGroup):
        read_count: int = counter("bytes the guest read")

    An instance has each as a plain attribute, and no others; counters and stores begin with 0.
    """

    __slots__ = ("_flushed",)

    def __init__(self) -> None:
        self._flushed: dict[str, int] = {}
        """Each counter's value at the last flush."""
        for name, field in type(self).fields.items():
            setattr(self, name, LatencyAggregate() if field.kind == "aggregate" else 0)

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name in type(self).fields)
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in values if value != 0)})"

    def flush(self) -> dict[str, Flushed]:
        """Every field: a counter's growth since the last flush, a store's value, an aggregate's three numbers."""
        flushed: dict[str, Flushed] = {}
        for name, field in type(self).fields.items():
            value = getattr(self, name)
            if field.kind == "aggregate":
                flushed[name] = value.flush()
            elif field.kind == "store":
                flushed[name] = value
            else:
                flushed[name] = self._growth(name, value)
        return flushed

    def begin_anew(self) -> None:
        """Counters are about to count from 0 again: what they are then came since this flush."""
        self._flushed.clear()
        for name, field in type(self).fields.items():
            if field.kind == "aggregate":
                getattr(self, name).begin_anew()

    def _growth(self, name: str, total: int) -> int:
        """A total that is a sum may be looked at while its parts are on the move: a step back is none."""
        before = self._flushed.get(name, 0)
        self._flushed[name] = max(total, before)
        return self._flushed[name] - before


def kinds(group: type[MetricGroup]) -> dict[str, Kind]:
    """``counter``, ``store`` or ``aggregate`` for each field of a class of groups, in order."""
    return {name: field.kind for name, field in group.fields.items()}


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
