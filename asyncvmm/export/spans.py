"""Spans: the records of one boot as a tree, phases within phases, with the guest's stages on it. Pure.

Phases are told as they end, children before their parents; a phase takes in those before it that name it as their
parent and lie within it. Times are ns since the VM's start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from asyncvmm.export.records import LARGEST, LARGEST_GUEST_NS, Record, number, text

ROOT = "total"
"""The phase that holds all others: boot() called to boot() returns."""

MAX_PHASES = 4096
"""Phases of a boot that are kept."""

MAX_STAGES = 64
"""Guest stages of a boot that are kept: a guest may repeat itself."""

_ERROR_FACTS = ("reason", "expected", "found", "state", "last_exit", "rip")


@attrs.frozen
class Instant:
    """Something that happened at one moment."""

    name: str
    t_ns: int
    attributes: Mapping[str, str | int] = attrs.field(factory=dict)


@attrs.define
class Span:
    """A phase. ``error`` says in a line how it failed, None if it did not."""

    name: str
    start_ns: int
    end_ns: int
    parent: str | None = None
    attributes: Mapping[str, str | int] = attrs.field(factory=dict)
    error: str | None = None
    children: list[Span] = attrs.field(factory=list)
    instants: list[Instant] = attrs.field(factory=list)

    def holds(self, other: Span) -> bool:
        """Whether the other lies within this one."""
        return self.start_ns <= other.start_ns and other.end_ns <= self.end_ns

    def walk(self) -> Iterator[Span]:
        """This span and all within it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


class BootSpans:
    """Collects the records of one VM until its boot is over, well or not. ``accel`` is known once it was chosen."""

    def __init__(self) -> None:
        self.accel: str | None = None
        self._loose: list[Span] = []
        self._stages: list[tuple[int, str, int]] = []
        self._error: Instant | None = None
        self._phases = 0

    def take(self, record: Record) -> Span | None:
        """Take the next record; gives the root of the tree when it is the one that ends the boot.

        Raises NotARecord for one that is not right.
        """
        match record.get("event"):
            case "accel.probe":
                self.accel = text(record, "accel")
            case "phase":
                self._add(record)
            case "guest.boot_time" if len(self._stages) < MAX_STAGES:
                guest_ns = number(record, "guest_ns", LARGEST_GUEST_NS)
                self._stages.append((number(record, "t_ns"), text(record, "stage"), guest_ns))
            case "vm.error" if self._error is None:
                self._error = _exception(record)
            case "boot.profile":
                return self._finish(_clock_offset(record))
            case "vm.state" if record.get("state") in ("stopped", "failed"):
                return self._finish(None)
        return None

    def _add(self, record: Record) -> None:
        if self._phases == MAX_PHASES:
            return
        self._phases += 1
        span = _span(record)
        inside = [other for other in self._loose if other.parent == span.name and span.holds(other)]
        span.children = inside
        self._loose = [other for other in self._loose if other not in inside] if inside else self._loose
        self._loose.append(span)

    def _finish(self, offset_ns: int | None) -> Span | None:
        if not self._loose:
            return None
        root = self._root()
        for arrived_ns, stage, guest_ns in self._stages:
            # Its line came after it, whatever the guest says: times and attributes have 64 bits and no more.
            t_ns = arrived_ns if offset_ns is None else min(arrived_ns, max(0, guest_ns + offset_ns))
            place = next((span for span in root.walk() if span.name == "boot_wait" and _within(span, t_ns)), root)
            place.instants.append(Instant(f"guest.{stage}", t_ns, _said(guest_ns)))
        if self._error is not None:
            root.instants.append(attrs.evolve(self._error, t_ns=min(self._error.t_ns, root.end_ns)))
            root.error = str(self._error.attributes["exception.message"])
        return root

    def _root(self) -> Span:
        """The phase that holds all others; one made up where a boot was recorded without."""
        last = self._loose[-1]
        rest = self._loose[:-1]
        if last.name != ROOT or not all(last.holds(span) for span in rest):
            start, end = min(span.start_ns for span in self._loose), max(span.end_ns for span in self._loose)
            error = next((span.error for span in self._loose if span.error), None)
            last, rest = Span(ROOT, start, end, error=error), self._loose
        last.children += rest
        last.children.sort(key=lambda span: span.start_ns)
        return last


def _span(record: Record) -> Span:
    start, parent = number(record, "start_ns"), record.get("parent")
    attributes: dict[str, str | int] = {"asyncvmm.attempt": number(record, "attempt")}
    if record.get("residual_ns") is not None:
        attributes["asyncvmm.residual_ns"] = number(record, "residual_ns")
    error = "the phase failed" if record.get("failed") is True else None
    end = start + number(record, "duration_ns")
    return Span(text(record, "name"), start, end, str(parent) if parent else None, attributes, error)


def _said(guest_ns: int) -> Mapping[str, str | int]:
    return {"asyncvmm.guest_ns": guest_ns} if guest_ns <= LARGEST else {}


def _exception(record: Record) -> Instant:
    what = text(record, "what")
    facts: dict[str, str | int] = {
        f"asyncvmm.{name}": str(record[name]) for name in _ERROR_FACTS if record.get(name) is not None
    }
    said = [f"{name} {record[name]}" for name in ("expected", "found", "state") if record.get(name) is not None]
    message = f"{what}: {', '.join(said)}" if said else what
    names: dict[str, str | int] = {"exception.type": text(record, "kind"), "exception.message": message}
    return Instant("exception", number(record, "t_ns"), names | facts)


def _clock_offset(record: Record) -> int | None:
    clock = record.get("guest_clock")
    offset = clock.get("offset_ns") if isinstance(clock, Mapping) else None
    return offset if isinstance(offset, int) else None


def _within(span: Span, t_ns: int) -> bool:
    return span.start_ns <= t_ns <= span.end_ns
