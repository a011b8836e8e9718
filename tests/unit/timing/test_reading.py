"""Event lines become recordings; what a file holds besides is told by its line, and nothing raises."""

from __future__ import annotations

import io

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.chart import lay_out
from asyncvmm.timing.compare import compare, group
from asyncvmm.timing.perfetto import trace_json
from asyncvmm.timing.reading import (
    MAX_KEPT,
    MAX_LINE,
    MAX_REMARKS,
    MAX_STAGES,
    Reading,
    capped_lines,
    read_recordings,
)
from asyncvmm.timing.recording import (
    RecordedClock,
    RecordedInstant,
    RecordedPhase,
    RecordedStage,
    Recording,
    RestoreStage,
)
from tests.support.recordings import MS, boot, line, phase, restore


def read(lines: list[bytes]) -> Reading:
    return read_recordings(capped_lines(io.BytesIO(b"".join(lines)).readline), "f")


def one(lines: list[bytes]) -> Recording:
    reading = read(lines)
    assert reading.remarks == ()
    (recording,) = reading.recordings
    return recording


def test_a_boot_is_read_whole() -> None:
    recording = one(boot())
    assert (recording.source, recording.vm, recording.accel, recording.state) == ("f", "a1b2", "qemu", "stopped")
    assert [phase.name for phase in recording.phases] == ["accel", "setup", "qemu_fork", "boot_wait", "boot", "total"]
    assert recording.phases[4] == RecordedPhase("boot", 15 * MS, 82 * MS, "total", False, 0, 1_600_000, 6)
    assert recording.stages[0] == RecordedStage("init_entry", 60 * MS, 96 * MS)
    assert recording.clock == RecordedClock(20 * MS, 500_000, "paired")
    assert recording.ready_ns == 96 * MS
    assert recording.profile == {"total": 80 * MS}
    assert not recording.failed


def test_a_boot_of_an_older_program_is_read_without_a_word() -> None:
    recording = one(boot(clock=False, total=False))
    assert recording.clock is None
    assert {phase.residual_ns for phase in recording.phases} == {None}


def test_each_vm_of_a_file_is_a_recording() -> None:
    reading = read([event for pair in zip(boot("a"), boot("b"), strict=True) for event in pair])
    assert [recording.vm for recording in reading.recordings] == ["a", "b"]
    assert [len(recording.phases) for recording in reading.recordings] == [6, 6]


def test_a_stage_that_only_the_profile_tells_is_kept_and_a_repeated_one_keeps_its_last_value() -> None:
    recording = one(
        [
            line("guest.boot_time", 5, stage="ready", guest_ns=1),
            line("guest.boot_time", 6, stage="ready", guest_ns=2),
            line("boot.profile", 7, guest={"ready_ns": 9, "init_ok_ns": 1, "other": "x"}),
        ]
    )
    assert recording.stages == (RecordedStage("init_ok", 1), RecordedStage("ready", 2, 6))


def test_instants_are_labelled_and_stand_by_time() -> None:
    recording = one(
        [
            line("vm.error", 9, kind="BootError", what="it broke"),
            line("guest.exit", 8, code=-1),
            line("guest.listener", 7, proto="tcp", port=80),
            line("guest.pre_exec", 6),
            line("log.lost", 5, lines=3),
            line("guest.heartbeat", 4, counter=1),
            line("snapshot.saved", 3, dir="x"),
        ]
    )
    labels = [instant.label for instant in recording.instants]
    assert labels == [
        "snapshot.saved",
        "3 lines lost",
        "workload starts",
        "listens on tcp 80",
        "workload exits with -1",
        "error: it broke",
    ]
    assert recording.instants[-1] == RecordedInstant("error: it broke", 9, "error")
    assert recording.lost_lines == 3
    assert recording.failed


def test_a_snapshot_and_a_restore_leave_their_instants_and_stages() -> None:
    recording = one(
        [
            line("snapshot.trigger", 10, trigger="pre_exec", detail="x", quiesce_ms=0),
            line("snapshot.saved", 30, trigger="pre_exec", trigger_ns=10, paused_ns=12, saved_ns=29),
            line("snapshot.failed", 35, kind="SnapshotFailed", what="x", trigger="after"),
            line("restore.mapped", 40, duration_ns=44),
            line("restore.first_guest_event", 45, duration_ns=49, kind="serial", minor_faults=3, major_faults=1),
            line("restore.step", 50, step="entropy", duration_ns=1),
        ]
    )
    assert [(instant.label, instant.t_ns) for instant in recording.instants] == [
        ("snapshot.trigger pre_exec", 10),
        ("paused", 12),
        ("snapshot.saved", 30),
        ("snapshot.failed after", 35),
        ("restore.step entropy", 50),
    ]
    assert recording.restore == (
        RestoreStage("restore.mapped", 40, 44),
        RestoreStage("restore.first_guest_event", 45, 49),
    )
    assert recording.faults == (3, 1)


def test_why_a_snapshot_failed_is_kept_as_far_as_it_is_told() -> None:
    facts = [
        {"kind": "CancelledError", "what": "x", "reason": "stopped"},
        {"what": "x", "found": "y"},
        {"kind": "E"},
        {},
    ]
    recording = one([line("snapshot.failed", n, **fact) for n, fact in enumerate(facts)])
    told = ["cancelled: reason stopped", "x: found y", "E", None]
    assert [instant.reason for instant in recording.instants] == told


def test_a_restore_is_complete_once_its_memory_is_in_place_and_failed_if_it_came_to_nothing() -> None:
    failed = [phase("total", 0, 9, failed=True), line("vm.error", 9, what="no")]
    assert one(restore()).complete
    assert one(restore()).what == "restore"
    assert one(restore()[:1]).what == "restore"  # it says so as it starts
    assert not one([*restore(), failed[1]]).failed  # what became of the guest is another matter
    assert one(failed).failed


def test_the_exits_of_a_final_state_are_kept() -> None:
    assert one([line("vm.state", 1, state="stopped", exits={"io": 5, "x": "y"})]).exits == {"io": 5}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"no JSON\n", "not an event of asyncvmm"),
        (b"\x7fELF\0\xff\n", "not an event of asyncvmm"),
        (b"[1]\n", "not an event of asyncvmm"),
        (b'{"level":"info","msg":"hello"}\n', "not an event of asyncvmm"),
        (line("guest.ready", 1)[:-9] + b"\n", "not an event of asyncvmm"),
        (b"[" * 5000 + b"\n", "not an event of asyncvmm"),
        (b"x" * (MAX_LINE + 1) + b"\n", f"longer than {MAX_LINE} bytes"),
        (line("guest.ready", -1), "t_ns: expected an integer from 0 to 9223372036854775807, found -1"),
        (line("guest.ready", 1 << 63), f"t_ns: expected an integer from 0 to {(1 << 63) - 1}, found {1 << 63}"),
        (b'{"v":1,"vm":"a","event":"phase","t_ns":1' + b"0" * 30 + b"}\n", "found 1e+30"),
        (line("guest.ready", 1.5), "found 1.5"),  # type: ignore[arg-type]
        (line("guest.ready", True), "found true"),
        (line("guest.ready", "1"), "found '1'"),  # type: ignore[arg-type]
        (line("guest.ready", 1, vm=None), "vm: expected text, found none"),  # type: ignore[arg-type]
        (line(["x"], 1), "event: expected text, found a list"),  # type: ignore[arg-type]
        (line("guest.ready", 1, v="1"), "v: expected an integer"),
        (line("guest.ready", 1, v=0), "v: expected version 1 to 1, found 0"),
        (phase("a", 5, -2), "duration_ns: expected an integer from 0"),
        (phase("a", 1, 2, failed=1), "failed: expected true or false, found 1"),
        (phase("a", 1, 2, attempt="0"), "attempt: expected an integer"),
        (phase("a", 1, 2, residual_ns=[]), "residual_ns: expected an integer"),
        (line("phase", 1, name="a", start_ns=1, duration_ns=1, parent={}), "parent: expected text, found an object"),
        (line("guest.boot_time", 1, stage="x", guest_ns=-1), "guest_ns: expected"),
        (line("guest.boot_time", 1, stage="\x1b[2J", guest_ns="\x1b[2J" * 99), "found '\\x1b[2J"),
        (line("boot.profile", 1, guest_clock={"offset_ns": 1}), "error_ns: expected an integer"),
        (line("boot.profile", 1, guest="x"), "guest: expected an object"),
    ],
)
def test_a_line_that_is_not_understood_is_told_and_the_rest_is_read(bad: bytes, said: str) -> None:
    reading = read([line("guest.ready", 1), bad, line("guest.pre_exec", 2)])
    (remark,) = reading.remarks
    assert remark.startswith("line 2: ")
    assert said in remark
    assert remark.isprintable()
    assert len(remark) < 200
    assert len(reading.recordings[0].instants) == 2


def test_a_file_that_ends_in_the_middle_of_a_line_is_told_so() -> None:
    reading = read([*boot()[:5], boot()[5][:-20]])
    assert reading.remarks == ("line 6: cut off: the file ends in the middle of it",)
    assert len(reading.recordings[0].phases) == 4


def test_a_whole_last_line_needs_no_newline() -> None:
    assert one([line("guest.ready", 1), line("guest.ready", 2).rstrip()]).instants[1].t_ns == 2


def test_a_byte_order_mark_blank_lines_and_crlf_do_no_harm() -> None:
    assert one([b"\xef\xbb\xbf", line("guest.ready", 1)[:-1] + b"\r\n", b"\r\n", b"\n"]).ready_ns == 1


def test_a_newer_version_is_told_once_and_read_as_far_as_it_is_understood() -> None:
    reading = read([line("guest.ready", 1, v=2, new=[]), line("guest.dreams", 2, v=2), phase("a", 1, 2, v=3)])
    assert reading.remarks == ("line 1: version 2, newer than 1: read as far as it is understood",)
    assert len(reading.recordings[0].phases) == 1


@pytest.mark.parametrize(("more", "said"), [(1, "and 1 more line"), (5000, "and 5000 more lines")])
def test_of_many_foreign_lines_the_first_are_named_and_the_others_counted(more: int, said: str) -> None:
    reading = read([b"no JSON\n"] * (MAX_REMARKS + more) + boot())
    assert reading.remarks[:-1] == tuple(f"line {n}: not an event of asyncvmm" for n in range(1, MAX_REMARKS + 1))
    assert reading.remarks[-1] == said
    assert len(reading.recordings[0].phases) == 6


def test_a_line_without_end_is_read_in_pieces_and_the_next_one_whole() -> None:
    asked = []

    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            asked.append(size)
            return super().readline(size)

    lines = list(capped_lines(Endless(b"x" * 1000 + b"\nnext\n").readline, cap=10))
    assert lines == [None, b"next\n"]
    assert max(size or 0 for size in asked) == 11


@pytest.mark.parametrize("size", [9, 10, 11, 12, 21])
def test_lines_up_to_the_cap_are_given_whole(size: int) -> None:
    text = b"x" * size + b"\n"
    lines = list(capped_lines(io.BytesIO(text + b"y\n").readline, cap=10))
    assert lines == [text if size <= 10 else None, b"y\n"]


def test_what_is_kept_of_a_file_is_bounded_and_the_rest_counted() -> None:
    reading = read([phase("a", 1, 2)] * (MAX_KEPT + 7))
    assert len(reading.recordings[0].phases) == MAX_KEPT
    assert reading.remarks == (f"7 events left out: at most {MAX_KEPT} events of 10000 VMs are kept",)


def test_a_guest_cannot_make_up_stages_without_end() -> None:
    reading = read([line("guest.boot_time", 1, stage=f"s{n}", guest_ns=n) for n in range(MAX_STAGES + 1)])
    assert len(reading.recordings[0].stages) == MAX_STAGES
    assert len(reading.remarks) == 1


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
NAMES = ["total", "boot", "a", "b", "\x1b[31m", "[bold]"]
KINDS = [
    "phase",
    "restore.mapped",
    "restore.first_guest_event",
    "guest.ready",
    "guest.boot_time",
    "vm.error",
    "boot.profile",
    "log.lost",
    "vm.state",
    "guest.exit",
]
small = st.integers(0, 50)
kinds = st.sampled_from(KINDS)
clocks = st.fixed_dictionaries({"offset_ns": small | json, "error_ns": small, "source": st.text(max_size=3)})
likely = st.fixed_dictionaries(
    {
        "v": st.sampled_from([1, 1, 1, 2]),
        "t_ns": small,
        "vm": st.sampled_from(["x", "y"]),
        "event": st.sampled_from(KINDS),
    },
    optional={
        "name": st.sampled_from(NAMES),
        "parent": st.none() | st.sampled_from(NAMES),
        "start_ns": small | json,
        "duration_ns": small | json,
        "residual_ns": small | json,
        "attempt": st.integers(0, 2) | json,
        "failed": st.booleans(),
        "stage": st.sampled_from(NAMES),
        "guest_ns": small | json,
        "guest": json | st.dictionaries(st.sampled_from(NAMES), small),
        "guest_clock": st.fixed_dictionaries(
            {"offset_ns": small | json, "error_ns": small, "source": st.text(max_size=3)}
        ),
        "what": st.text(max_size=5),
        "lines": small,
        "code": json,
        "state": st.text(max_size=3),
        "exits": json,
    },
)
rubbish = st.binary(max_size=60) | json.map(orjson.dumps)
lines = st.lists((rubbish | likely.map(lambda event: orjson.dumps(event) + b"\n")), max_size=20)


@given(lines)
def test_whatever_bytes_a_file_holds_they_are_read_laid_out_compared_and_traced(some: list[bytes]) -> None:
    reading = read(some)
    charts = [lay_out(recording) for recording in reading.recordings]
    for chart in charts:
        assert all(row.label.isprintable() for row in chart.rows)
        assert all(0 <= chart.place(row.start_ns) <= 1 for row in chart.rows)
        assert all(row.start_ns >= 0 and (row.duration_ns or 0) >= 0 for row in chart.rows)
    compare([group("all", charts), *(group("one", [chart]) for chart in charts)])
    trace_json(charts)


@given(st.binary(), st.integers(1, 8))
def test_lines_are_split_as_they_are_whatever_the_bytes(data: bytes, cap: int) -> None:
    got = list(capped_lines(io.BytesIO(data).readline, cap))
    assert all(line in (None, full) for line, full in zip(got, io.BytesIO(data), strict=True))
