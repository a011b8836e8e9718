"""Compares boots in groups: each phase's median and spread, and by how much each group differs from the first.

A group is what one file holds. Boots that failed or are cut short are counted and left out. A difference of medians
counts as a move only if it is larger than the larger spread of the two groups (the interquartile range of four boots or
more, else the range); of single boots no spread is known, and that is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import attrs

from asyncvmm.timing.chart import GUEST, RESIDUAL, RESTORE, Chart, Row
from asyncvmm.timing.recording import TOTAL
from asyncvmm.timing.text import duration_text, printable

QUARTILES_FROM = 4
"""Boots from which on quartiles are told."""

Path = tuple[str, ...]
Verdict = Literal["moved", "within spread", "spread unknown"]


@attrs.frozen
class Spread:
    """How long something took over ``count`` boots, ns. ``quartiles``: the first and the third, None of few boots."""

    count: int
    median: int
    least: int
    most: int
    quartiles: tuple[int, int] | None = None

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        """The spread of at least one value."""
        quartiles = None
        if len(values) >= QUARTILES_FROM:
            first, _, third = statistics.quantiles(values, n=4, method="inclusive")
            quartiles = int(first), int(third)
        return cls(len(values), int(statistics.median(values)), min(values), max(values), quartiles)

    @property
    def width(self) -> int | None:
        """The interquartile range, of few boots the range, None of one."""
        if self.quartiles is not None:
            return self.quartiles[1] - self.quartiles[0]
        return self.most - self.least if self.count > 1 else None


@attrs.frozen
class Delta:
    """How ``median`` differs from the first group's: by ``ns``, which is ``share`` of it (None of 0)."""

    ns: int
    share: float | None
    verdict: Verdict
    spread_ns: int | None


@attrs.frozen
class Group:
    """The boots of one file. ``left_out`` of them failed or are incomplete, and are in no figure."""

    name: str
    charts: tuple[Chart, ...]
    left_out: int = 0

    @property
    def what(self) -> str:
        """What its figures are of: ``boot``, ``restore``, or ``VM`` where there are both."""
        kinds = {chart.recording.what for chart in self.charts} or {"boot"}
        return kinds.pop() if len(kinds) == 1 else "VM"

    @property
    def total_spans(self) -> str:
        """From where to where their totals are, if all are restores."""
        spans = {chart.total_spans for chart in self.charts}
        if len(spans) == 1:
            return spans.pop()
        return "from call to the last stage of each" if self.what == RESTORE else ""


@attrs.frozen
class Line:
    """One phase over all groups: what it took in each (None: not there), and each one's difference from the first."""

    path: Path
    spreads: tuple[Spread | None, ...]
    deltas: tuple[Delta | None, ...]
    leaf: bool

    @property
    def label(self) -> str:
        """The phase's name, harmless to show."""
        if self.path[-1] == RESIDUAL and len(self.path) > 1:
            return f"{RESIDUAL} of {printable(self.path[-2])}"
        return printable(self.path[-1])

    @property
    def guest(self) -> bool:
        """Whether it is a stage of the guest."""
        return self.path[0] == GUEST

    @property
    def restore(self) -> bool:
        """Whether it is a stage of a restore."""
        return self.path[0] == RESTORE

    @property
    def depth(self) -> int:
        """How deep it is nested."""
        return len(self.path) - 1 - (self.guest or self.restore)


@attrs.frozen
class Comparison:
    """Groups and their phases in the order of a boot; ``conclusions`` say in a sentence each what moved."""

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    conclusions: tuple[str, ...]

    @property
    def spread(self) -> bool:
        """Whether any group has more than one boot, and so a spread."""
        return any(len(one.charts) > 1 for one in self.groups)


def group(name: str, charts: Sequence[Chart]) -> Group:
    """The group of a file's charts."""
    good = tuple(chart for chart in charts if chart.recording.complete and chart.total_ns)
    return Group(name, good, len(charts) - len(good))


def compare(groups: Sequence[Group]) -> Comparison:
    """Compare each group with the first."""
    samples = [_samples(one.charts) for one in groups]
    places = _places(groups)
    known = {path for one in samples for path in one}
    paths = sorted(known, key=lambda path: [(places.get(path[:n], 0.0), path[n - 1]) for n in range(1, len(path) + 1)])
    inner = {path[:n] for path in paths if path[-1] != RESIDUAL for n in range(1, len(path))}
    lines = tuple(_line(path, samples, path not in inner) for path in paths)
    conclusions = tuple(_conclusion(groups, lines, number) for number in range(1, len(groups)))
    return Comparison(tuple(groups), lines, conclusions)


def _samples(charts: Sequence[Chart]) -> dict[Path, list[int]]:
    samples: dict[Path, list[int]] = {}
    for chart in charts:
        sums: dict[Path, int] = {(TOTAL,): chart.total_ns}
        for path, row in _paths(chart):
            sums[path] = sums.get(path, 0) + (row.duration_ns or 0)
        for path, value in sums.items():
            samples.setdefault(path, []).append(value)
    return samples


def _places(groups: Sequence[Group]) -> Mapping[Path, float]:
    # Where each phase begins in its boot; residuals and the guest's stages stand after what they belong to.
    starts: dict[Path, list[float]] = {}
    for chart in (chart for one in groups for chart in one.charts):
        starts.setdefault((TOTAL,), []).append(0.0)
        for path, row in _paths(chart):
            last = path[-1] == RESIDUAL
            starts.setdefault(path, []).append(float("inf") if last else float(row.start_ns - chart.start_ns))
    places = {path: statistics.median(values) for path, values in starts.items()}
    return {**places, (TOTAL,): -1.0, **dict.fromkeys([(RESTORE,), (GUEST,)], float("inf"))} if places else {}


def _paths(chart: Chart) -> Iterator[tuple[Path, Row]]:
    rows = [(row.path[1:] if row.path[0] == TOTAL else row.path, row) for row in chart.host]
    final: dict[str, int] = {}
    for path, row in rows:
        if path:
            final[path[0]] = max(row.attempt, final.get(path[0], 0))
    for path, row in rows:
        if not path:
            continue
        if row.attempt < final[path[0]]:
            path = (f"{path[0]} (attempt {row.attempt})", *path[1:])
        yield (TOTAL, *path), row
    for row in (*chart.restore, *chart.guest):
        if row.off_axis_ns is None:
            yield row.path, row


def _line(path: Path, samples: Sequence[Mapping[Path, list[int]]], leaf: bool) -> Line:
    spreads = tuple(Spread.of(one[path]) if path in one else None for one in samples)
    first = spreads[0]
    deltas = tuple(None if first is None or other is None else _delta(first, other) for other in spreads[1:])
    return Line(path, spreads, (None, *deltas), leaf)


def _delta(first: Spread, other: Spread) -> Delta:
    ns = other.median - first.median
    widths = [one.width for one in (first, other) if one.width is not None]
    spread_ns = max(widths, default=None)
    verdict: Verdict = "spread unknown"
    if spread_ns is not None:
        verdict = "within spread" if abs(ns) <= spread_ns else "moved"
    return Delta(ns, ns / first.median if first.median else None, verdict, spread_ns)


def delta_text(delta: Delta) -> str:
    """``+118 ms (+4.9%)``."""
    sign = "+" if delta.ns > 0 else ""
    share = "" if delta.share is None else f" ({delta.share * 100:+.1f}%)"
    return f"{sign}{duration_text(delta.ns)}{share}"


def _conclusion(groups: Sequence[Group], lines: Sequence[Line], number: int) -> str:
    name = printable(groups[number].name)
    total = next((line.deltas[number] for line in lines if line.path == (TOTAL,)), None)
    if total is None:
        empty = groups[0] if not groups[0].charts else groups[number]
        return f"{name}: nothing to compare, {printable(empty.name)} has no successful {empty.what}"
    words = {
        "moved": f"more than the spread ({duration_text(total.spread_ns or 0)})",
        "within spread": f"within the spread ({duration_text(total.spread_ns or 0)})",
        "spread unknown": f"one {groups[number].what} each, so the spread is unknown",
    }
    said = [f"{name}: total {delta_text(total)}, {words[total.verdict]}"]
    said.append(_most_moved([line for line in lines if line.leaf and line.path[0] == TOTAL], number, "phase"))
    said.append(_most_moved([line for line in lines if line.restore], number, "restore stage"))
    said.append(_most_moved([line for line in lines if line.guest], number, "guest stage"))
    return "; ".join(part for part in said if part)


def _most_moved(lines: Sequence[Line], number: int, kind: str) -> str:
    there = [(line, delta) for line in lines if (delta := line.deltas[number]) is not None]
    if not there:
        return ""
    moved = [pair for pair in there if pair[1].verdict != "within spread" and pair[1].ns]
    if not moved:
        return f"no {kind} moved by more than its spread"
    line, delta = max(moved, key=lambda pair: abs(pair[1].ns))
    verb = "moved" if delta.verdict == "moved" else "differs"
    return f"the {kind} that {verb} most is {line.label}, {delta_text(delta)}"
