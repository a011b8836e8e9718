"""Charts as Chrome trace events in JSON, which Perfetto and chrome://tracing open.

Each VM is a process, its host and its guest are threads; phases and stages are complete events ("X"), the rest instants
("i"), names are metadata ("M"). Times are microseconds with fractions, from each VM's start: boots lie over each other.
Facts: "Trace Event Format" (the Chromium project's document), and Perfetto's "Visualizing external trace formats".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import orjson

from asyncvmm.timing.chart import Chart, Row
from asyncvmm.timing.text import printable

HOST, GUEST, OVERLAPPING = 1, 2, 3
"""Thread numbers. Slices of a thread must nest; those that do not are on threads from OVERLAPPING on."""

_MAX_LANES = 64

TraceEvent = dict[str, object]


def trace_json(charts: Sequence[Chart]) -> bytes:
    """The trace, as one JSON object on one line."""
    events = [event for pid, chart in enumerate(charts, 1) for event in _process(pid, chart)]
    return orjson.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, option=orjson.OPT_APPEND_NEWLINE)


def _process(pid: int, chart: Chart) -> Iterator[TraceEvent]:
    source = printable(chart.recording.source)
    yield _metadata(pid, HOST, "process_name", name=f"VM {chart.name} ({source})")
    yield _metadata(pid, HOST, "process_labels", labels=chart.headline)
    yield _metadata(pid, HOST, "process_sort_index", sort_index=pid)
    threads = {HOST: "host", GUEST: "guest"}
    slices = list(_slices(pid, chart))
    threads |= {tid: "host, overlapping" for event in slices if (tid := int(str(event["tid"]))) >= OVERLAPPING}
    for tid, name in threads.items():
        yield _metadata(pid, tid, "thread_name", name=name)
        yield _metadata(pid, tid, "thread_sort_index", sort_index=tid)
    yield from slices
    for row in chart.instants:
        scope = "p" if row.kind in ("ready", "error") else "t"
        yield {**_event(pid, GUEST, row), "ph": "i", "s": scope}


def _slices(pid: int, chart: Chart) -> Iterator[TraceEvent]:
    residuals = {row.path[:-1]: row.duration_ns for row in chart.host if row.kind == "residual"}
    for tid, row in _nesting(row for row in chart.host if row.kind == "phase"):
        args: TraceEvent = {"duration_ns": row.duration_ns, "attempt": row.attempt, "failed": row.failed}
        if row.path in residuals:
            args["residual_ns"] = residuals[row.path]
        yield {**_event(pid, tid, row), "ph": "X", "dur": _us(row.duration_ns or 0), "args": args}
    for row in chart.guest:
        yield from _stage(pid, chart, row)


def _stage(pid: int, chart: Chart, row: Row) -> Iterator[TraceEvent]:
    event = {**_event(pid, GUEST, row), "args": {"duration_ns": row.duration_ns}}
    if chart.recording.clock is not None:
        yield {**event, "ph": "X", "dur": _us(row.duration_ns or 0)}
    else:  # only when its line came is known
        yield {**event, "ph": "i", "s": "t", "ts": _us(row.end_ns)}


def _nesting(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Each row with the first thread on which it nests with what is there already."""
    lanes: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: (row.start_ns, -row.end_ns, row.depth)):
        number = next((number for number, lane in enumerate(lanes) if _fits(row, lane)), len(lanes))
        if number < _MAX_LANES:
            if number == len(lanes):
                lanes.append([])
            lanes[number].append(row)
            yield (HOST if number == 0 else OVERLAPPING + number - 1), row


def _fits(row: Row, lane: list[Row]) -> bool:
    while lane and lane[-1].end_ns <= row.start_ns:
        lane.pop()
    return not lane or row.end_ns <= lane[-1].end_ns


def _event(pid: int, tid: int, row: Row) -> TraceEvent:
    return {"name": row.label, "cat": row.kind, "pid": pid, "tid": tid, "ts": _us(row.start_ns)}


def _metadata(pid: int, tid: int, kind: str, **args: object) -> TraceEvent:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": args}


def _us(ns: int) -> float:
    return ns / 1000
