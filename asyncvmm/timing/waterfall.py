"""A boot's JSON lines as a waterfall: host phases and guest stages on one axis, for a terminal.

Pure: lines in, rows out; ``render`` gives text. Lines that are not ours are named and passed over, the rest is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import orjson

BAR_WIDTH = 48

MAX_REMARKS = 10
"""Lines not understood that are named; of more, only the number is told."""

_MILLISECOND = 1_000_000


@attrs.frozen
class Row:
    """One span or instant on the axis; times in ns since the VM's start. ``depth`` is how deep the phase is nested."""

    label: str
    start_ns: int
    duration_ns: int | None = None
    depth: int = 0


@attrs.frozen
class Waterfall:
    """What a file showed: the VM's name, empty if there was no event; its rows by start; what was not understood."""

    vm: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()


def read_waterfall(lines: Iterable[bytes]) -> Waterfall:
    """Read one VM's events; those of other VMs in the same file are remarked upon."""
    vm, remarks = "", _Remarks()
    phases: list[Mapping[str, object]] = []
    instants: list[Row] = []
    for number, line in enumerate(lines, 1):
        event = _event(line)
        if event is None:
            remarks.add(f"line {number}: not an event of asyncvmm")
            continue
        vm = vm or str(event["vm"])
        if event["vm"] != vm:
            remarks.add(f"line {number}: of another VM, {event['vm']}")
        elif event["event"] == "phase":
            phases.append(event)
        else:
            instants += _instant(event)
    rows = [*_phase_rows(phases), *instants]
    return Waterfall(vm, tuple(sorted(rows, key=lambda row: (row.start_ns, row.depth))), remarks.told())


class _Remarks:
    """The first few remarks, and how many more there would be."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._more = 0

    def add(self, remark: str) -> None:
        if len(self._first) < MAX_REMARKS:
            self._first.append(remark)
        else:
            self._more += 1

    def told(self) -> tuple[str, ...]:
        more = [f"and {self._more} more line{'s' * (self._more > 1)}"] if self._more else []
        return (*self._first, *more)


def _event(line: bytes) -> dict[str, object] | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("t_ns"), int):
        return None
    return event if {"vm", "event"} <= event.keys() else None


def _instant(event: Mapping[str, object]) -> list[Row]:
    labels = {
        "guest.boot_time": f"guest {event.get('stage')}",
        "guest.ready": "READY",
        "guest.pre_exec": "workload starts",
        "guest.exit": f"workload exits with {event.get('code')}",
        "vm.error": f"error: {event.get('what')}",
    }
    label = labels.get(str(event["event"]))
    return [Row(label, int(str(event["t_ns"])))] if label else []


def _phase_rows(phases: list[Mapping[str, object]]) -> list[Row]:
    parents = {str(phase.get("name")): phase.get("parent") for phase in phases}
    rows = []
    for phase in phases:
        start, duration = phase.get("start_ns"), phase.get("duration_ns")
        if isinstance(start, int) and isinstance(duration, int):
            rows.append(Row(str(phase.get("name")), start, duration, _depth(phase.get("parent"), parents)))
    return rows


def _depth(parent: object, parents: Mapping[str, object]) -> int:
    depth = 0
    while parent is not None and depth < len(parents):
        parent, depth = parents.get(str(parent)), depth + 1
    return depth


def render(waterfall: Waterfall, width: int = BAR_WIDTH) -> str:
    """The waterfall as lines of text: start, duration, bar, label."""
    if not waterfall.rows:
        return "no phases and no guest stages"
    end = max(row.start_ns + (row.duration_ns or 0) for row in waterfall.rows) or 1
    lines = [f"VM {waterfall.vm}: {end / _MILLISECOND:.1f} ms", f"{'start ms':>10} {'took ms':>10}"]
    lines += [_line(row, end, width) for row in waterfall.rows]
    return "\n".join(lines)


def _line(row: Row, end: int, width: int) -> str:
    start = min(width - 1, row.start_ns * width // end)
    if row.duration_ns is None:
        bar, took = "◆", ""
    else:
        bar, took = "━" * max(1, row.duration_ns * width // end), f"{row.duration_ns / _MILLISECOND:.3f}"
    place = (" " * max(0, start) + bar)[:width].ljust(width)
    return f"{row.start_ns / _MILLISECOND:>10.3f} {took:>10} {place} {'  ' * row.depth}{row.label}"
