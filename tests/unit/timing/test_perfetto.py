"""The trace is what the Trace Event Format asks for: a process for each VM, slices that nest, exact times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from asyncvmm.timing.chart import lay_out
from asyncvmm.timing.perfetto import GUEST, HOST, RESTORE, trace_json
from asyncvmm.timing.reading import read_recordings
from tests.support.recordings import MS, boot, line, phase, restore

SCHEMA = orjson.loads(Path(__file__).with_name("trace_event.schema.json").read_bytes())
VALIDATOR = Draft202012Validator(SCHEMA)

Event = dict[str, Any]


def trace(lines: Sequence[bytes]) -> list[Event]:
    charts = [lay_out(recording) for recording in read_recordings(lines, "f").recordings]
    whole = orjson.loads(trace_json(charts))
    VALIDATOR.validate(whole)
    events: list[Event] = whole["traceEvents"]
    return events


def find(events: list[Event], name: str) -> Event:
    (found,) = [event for event in events if event["name"] == name]
    return found


def assert_slices_nest(events: list[Event]) -> None:
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            threads[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
    for slices in threads.values():
        inside: list[tuple[int, int]] = []
        for start, end in sorted(slices, key=lambda slice: (slice[0], -slice[1])):
            while inside and inside[-1][1] <= start:
                inside.pop()
            assert not inside or end <= inside[-1][1]
            inside.append((start, end))


def test_phases_are_slices_of_the_hosts_thread_and_stages_of_the_guests() -> None:
    events = trace(boot())
    fork, stage = find(events, "qemu_fork"), find(events, "init_entry")
    assert (fork["ph"], fork["tid"], fork["ts"], fork["dur"]) == ("X", HOST, 15_000, 400)
    assert fork["args"] == {"duration_ns": 400_000, "attempt": 0, "failed": False}
    assert (stage["ph"], stage["tid"], stage["ts"], stage["dur"]) == ("X", GUEST, 20_000, 60_000)
    assert find(events, "boot")["args"]["residual_ns"] == 1_600_000
    assert_slices_nest(events)


def test_the_stages_of_a_restore_are_slices_of_a_thread_of_their_own() -> None:
    events = trace(restore())
    stage = find(events, "restore.first_exit")
    assert (stage["ph"], stage["tid"], stage["ts"], stage["dur"]) == ("X", RESTORE, 10_000, 5_000)
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {HOST: "host", GUEST: "guest", RESTORE: "restore"}
    assert_slices_nest(events)


def test_instants_are_instants() -> None:
    ready = find(trace(boot()), "READY")
    assert (ready["ph"], ready["s"], ready["ts"]) == ("i", "p", 96_000)


def test_why_a_snapshot_failed_is_an_argument_of_its_instant() -> None:
    failed = line("snapshot.failed", MS, kind="SnapshotFailed", what="snapshot", found="it there")
    assert find(trace([failed]), "snapshot.failed")["args"] == {"reason": "SnapshotFailed, snapshot: found it there"}


def test_times_keep_their_nanoseconds() -> None:
    event = find(trace([phase("a", 1_234_567_891_234_567, 3)]), "a")
    assert (event["ts"], event["dur"]) == (1_234_567_891_234.567, 0.003)


def test_each_vm_is_a_process_with_a_name_and_named_threads() -> None:
    events = trace([*boot("a"), *boot("b")])
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["VM a (f)", "VM b (f)"]
    assert {event["pid"] for event in events} == {1, 2}
    assert [event["args"]["name"] for event in events if event["name"] == "thread_name"] == ["host", "guest"] * 2


def test_without_a_guest_clock_stages_are_instants_where_their_lines_came() -> None:
    stage = find(trace(boot(clock=False)), "mounts_done")
    assert (stage["ph"], stage["ts"], stage["args"]) == ("i", 96_000, {"duration_ns": 2 * MS})


@pytest.mark.parametrize("clock", [True, False])
def test_an_absurd_stage_is_an_instant_where_its_line_came(clock: bool) -> None:
    most = (1 << 64) - 1
    events = trace([*boot(clock=clock), line("guest.boot_time", 90 * MS, stage="liar", guest_ns=most)])
    liar = find(events, "liar")
    assert (liar["ph"], liar["ts"], liar["args"]) == ("i", 90_000, {"off_axis_ns": most})
    assert max(event["ts"] + event.get("dur", 0) for event in events) == 100_000


def test_phases_that_overlap_are_on_threads_of_their_own() -> None:
    events = trace([phase("a", 0, 10), phase("b", 5, 10), phase("c", 7, 1)])
    assert find(events, "a")["tid"] != find(events, "b")["tid"]
    assert "host, overlapping" in [event["args"].get("name") for event in events if event["ph"] == "M"]
    assert_slices_nest(events)


@pytest.mark.parametrize(
    "change", [{"ph": "Z"}, {"ts": "1"}, {"dur": None}, {"pid": "x"}, {"name": 1}, {"ph": "M"}, {"args": []}]
)
def test_the_schema_refuses_what_is_no_trace_event(change: dict[str, object]) -> None:
    good = {"name": "a", "ph": "X", "ts": 1.5, "dur": 2, "pid": 1, "tid": 1}
    VALIDATOR.validate({"traceEvents": [good]})
    with pytest.raises(ValidationError):
        VALIDATOR.validate({"traceEvents": [{**good, **change}]})


numbers = st.integers(0, 30)
names = st.sampled_from(["total", "a", "b"])
phases = st.tuples(names, numbers, numbers, st.none() | names).map(lambda told: phase(*told))
stages = st.tuples(names, numbers, numbers).map(lambda s: line("guest.boot_time", s[1], stage=s[0], guest_ns=s[2]))
clock = line("boot.profile", 1, guest_clock={"offset_ns": 3, "error_ns": 1, "source": "tsc"})


@given(st.lists(phases | stages | st.just(clock), max_size=12))
def test_whatever_overlaps_the_slices_of_a_thread_nest(lines: list[bytes]) -> None:
    assert_slices_nest(trace(lines))
