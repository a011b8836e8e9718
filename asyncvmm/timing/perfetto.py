"""Charts as Chrome trace events in JSON, which Perfetto and chrome://tracing open.

Each VM is a process, its host and its guest are threads, and so is its restore; phases and stages are complete events
("X"), the rest instants ("i"), names are metadata ("M"). Times are microseconds with fractions, from each VM's start:
boots lie over each other.
Facts: "Trace Event Format" (the Chromium project's document), and Perfetto's "Visualizing external trace formats".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import orjson

from asyncvmm.timing.chart import Chart, Row
from asyncvmm.timing.text import printable

HOST, GUEST, RESTORE = 1, 2, 3
"""Thread numbers."""

HOST_MORE, GUEST_MORE = 1_000, 10_000
"""Slices of a thread must nest. Those that do not are on threads of their own, numbered from here."""

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
    if chart.restore:
        threads[RESTORE] = "restore"
    slices = list(_slices(pid, chart))
    used = {int(str(event["tid"])) for event in slices}
    threads |= {
        tid: f"{'guest' if tid >= GUEST_MORE else 'host'}, overlapping" for tid in sorted(used) if tid >= HOST_MORE
    }
    for tid, name in threads.items():
        yield _metadata(pid, tid, "thread_name", name=name)
        yield _metadata(pid, tid, "thread_sort_index", sort_index=tid)
    yield from slices
    for row in chart.instants:
        scope = "p" if row.kind in ("ready", "error") else "t"
        said = {} if row.reason is None else {"args": {"reason": row.reason}}
        yield {**_event(pid, GUEST, row), "ph": "i", "s": scope, **said}


def _slices(pid: int, chart: Chart) -> Iterator[TraceEvent]:
    residuals = {row.path[:-1]: row.duration_ns for row in chart.host if row.kind == "residual"}
    phases = (row for row in chart.host if row.kind == "phase")
    for tid, row in _nesting(phases, HOST, HOST_MORE):
        args: TraceEvent = {"duration_ns": row.duration_ns, "attempt": row.attempt, "failed": row.failed}
        if row.path in residuals:
            args["residual_ns"] = residuals[row.path]
        yield {**_event(pid, tid, row), "ph": "X", "dur": _us(row.duration_ns or 0), "args": args}
    for row in chart.restore:
        event = {**_event(pid, RESTORE, row), "ph": "X", "dur": _us(row.duration_ns or 0)}
        yield {**event, "args": {"duration_ns": row.duration_ns}}
    stages = [row for row in chart.guest if row.off_axis_ns is None]
    if chart.recording.clock is not None:
        for tid, row in _nesting(stages, GUEST, GUEST_MORE):
            event = {**_event(pid, tid, row), "ph": "X", "dur": _us(row.duration_ns or 0)}
            yield {**event, "args": {"duration_ns": row.duration_ns}}
    else:  # only when their lines came is known
        for row in stages:
            event = {**_event(pid, GUEST, row), "ph": "i", "s": "t", "ts": _us(row.end_ns)}
            yield {**event, "args": {"duration_ns": row.duration_ns}}
    for row in chart.guest:
        if row.off_axis_ns is not None:
            yield {**_event(pid, GUEST, row), "ph": "i", "s": "t", "args": {"off_axis_ns": row.off_axis_ns}}


def _nesting(rows: Iterable[Row], thread: int, more: int) -> Iterator[tuple[int, Row]]:
    """Each row with the first thread on which it nests with what is there: ``thread``, else one from ``more`` on."""
    lanes: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: (row.start_ns, -row.end_ns, row.depth)):
        number = next((number for number, lane in enumerate(lanes) if _fits(row, lane)), len(lanes))
        if number == len(lanes):
            lanes.append([])
        lanes[number].append(row)
        yield (thread if number == 0 else more + number - 1), row


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
