"""A recording is laid out on the boot's axis: rows in order, residuals and guest stages where they belong."""

from __future__ import annotations

import attrs
import pytest

from asyncvmm.timing.chart import MAX_ROWS, Chart, lay_out
from asyncvmm.timing.reading import read_recordings
from asyncvmm.timing.recording import RecordedClock, RecordedInstant, RecordedPhase, RecordedStage, Recording
from tests.support.recordings import MS, boot, line, phase, restore


def chart(lines: list[bytes]) -> Chart:
    (recording,) = read_recordings(lines, "f").recordings
    return lay_out(recording)


def test_phases_stand_as_a_tree_with_what_is_left_over_after_them() -> None:
    rows = chart(boot()).host
    assert [("  " * row.depth + row.label, row.start_ns, row.duration_ns) for row in rows] == [
        ("total", MS, 99 * MS),
        ("  accel", MS, 9 * MS),
        ("  setup", 10 * MS, 5 * MS),
        ("  boot", 15 * MS, 82 * MS),
        ("    qemu_fork", 15 * MS, 400_000),
        ("    boot_wait", 16 * MS, 80 * MS),
        ("    residual of boot", 15_400_000, 1_600_000),
        ("  residual of total", 97 * MS, 3 * MS),
    ]


def test_guest_stages_are_spans_on_the_hosts_axis_by_the_guests_clock() -> None:
    rows = chart(boot()).guest
    assert [(row.label, row.start_ns, row.duration_ns) for row in rows[:3]] == [
        ("init_entry", 20 * MS, 60 * MS),
        ("mounts_done", 80 * MS, 2 * MS),
        ("uart_access_done", 82 * MS, 2 * MS),
    ]
    assert chart(boot()).notes == ("guest clock tied to the host's (paired), off by at most 500 us",)


def test_without_a_guest_clock_stages_stand_where_their_lines_came_and_that_is_said() -> None:
    drawn = chart(boot(clock=False))
    assert {row.end_ns for row in drawn.guest} == {96 * MS}
    assert [row.duration_ns for row in drawn.guest[:2]] == [60 * MS, 2 * MS]
    assert drawn.notes == ("guest stages stand where their lines arrived: the file has no guest clock",)


CLOCKS = [RecordedClock(0, 0, "paired"), RecordedClock(1 - (1 << 64), 0, "tsc"), None]


@pytest.mark.parametrize("clock", CLOCKS, ids=["paired", "forged", "none"])
def test_a_stage_that_says_a_time_before_the_vm_was_is_off_the_axis(clock: RecordedClock | None) -> None:
    most = (1 << 64) - 1
    stages = (RecordedStage("a", 5, 8), RecordedStage("b\n", 10, 9), RecordedStage("c", most, 9))
    drawn = lay_out(Recording("f", "v", (RecordedPhase("total", 0, 10),), stages, clock=clock))
    assert [(row.label, row.duration_ns, row.off_axis_ns) for row in drawn.guest] == [
        ("a", 5, None),
        ("b\\x0a", None, 10),
        ("c", None, most),
    ]
    assert (drawn.start_ns, drawn.end_ns) == (0, 10)
    assert "off the axis, b\\x0a says 10 ns: its line came after 9 ns" in drawn.notes
    assert "off the axis, c says 18446744073709 ms: its line came after 9 ns" in drawn.notes


def test_a_stage_of_which_no_line_is_there_is_held_against_the_boots_end() -> None:
    stages = (RecordedStage("a", 10), RecordedStage("b", 11))
    drawn = lay_out(Recording("f", "v", (RecordedPhase("total", 0, 10),), stages, clock=RecordedClock(0, 0, "tsc")))
    assert [row.off_axis_ns for row in drawn.guest] == [None, 11]
    assert "off the axis, b says 11 ns: the boot ended after 10 ns" in drawn.notes


def test_the_axis_of_a_restore_goes_from_its_call_to_the_first_sign_of_its_guest() -> None:
    drawn = chart(restore())
    assert (drawn.start_ns, drawn.end_ns, drawn.total_ns) == (0, 39 * MS, 40 * MS)
    assert [(row.label, row.start_ns, row.duration_ns) for row in drawn.restore] == [
        ("restore.mapped", 0, 10 * MS),
        ("restore.first_exit", 10 * MS, 5 * MS),
        ("restore.first_guest_event", 15 * MS, 24 * MS),
    ]
    assert [row.label for row in drawn.instants] == ["restore.step entropy"]
    assert drawn.headline == (
        "restored on kvm, total 40.0 ms from call to first guest event, mapped after 11.0 ms, first exit after 16.0 ms"
    )
    assert drawn.notes == (
        "restoring is the phase total in the file: from the call until memory and state are in place",
        "the restore was called 1.00 ms before the VM's start, where the axis begins",
        "page faults until the first guest event: 3 minor, 0 major",
    )


def test_a_restore_whose_guest_has_said_nothing_yet_ends_with_what_it_came_to() -> None:
    drawn = chart(restore()[:4])
    assert (drawn.start_ns, drawn.end_ns) == (0, 10 * MS)
    assert drawn.headline == "restored on kvm, total 11.0 ms from call until mapped"


def test_no_row_of_a_restore_is_called_total_beside_the_total_that_it_has() -> None:
    drawn = chart(restore())
    assert [(row.label, row.depth, row.duration_ns) for row in drawn.host] == [
        ("restoring", 0, 9 * MS),
        ("memory_register", 1, 2 * MS),
        ("residual of restoring", 1, 7 * MS),
        ("resume_kvm_run", 0, 4 * MS),
    ]


def test_a_restore_that_was_in_place_after_its_first_exit_is_told_until_then() -> None:
    ahead = [
        line("restore.mapped", 2 * MS, duration_ns=2 * MS),
        line("restore.first_exit", 3 * MS, duration_ns=3 * MS),
        phase("total", 0, 4 * MS),
    ]
    assert chart(ahead).headline == (
        "restored, total 4.00 ms from call until in place, mapped after 2.00 ms, first exit after 3.00 ms"
    )


def test_what_a_clock_went_on_between_two_looks_at_it_is_not_taken_for_an_earlier_call() -> None:
    late = [*restore()[2:3], line("restore.mapped", 10 * MS, duration_ns=10 * MS)]
    late.append(line("restore.first_exit", 11 * MS, duration_ns=11 * MS + 1_500))
    assert not [note for note in chart(late).notes if "before the VM's start" in note]
    assert chart(late).total_ns == 11 * MS


def test_a_restore_that_came_to_nothing_is_none_of_the_boots() -> None:
    lines = [*restore()[:1], phase("total", 0, 3 * MS, failed=True), line("vm.error", 3 * MS, what="cpu")]
    drawn = chart(lines)
    assert drawn.headline == "restore failed after 3.00 ms on kvm"
    assert drawn.host[0].label == "restoring"


def test_why_a_snapshot_failed_is_said() -> None:
    facts = {"expected": "a path\n", "found": "it there", "state": "ready"}
    failed = line("snapshot.failed", 200 * MS, kind="SnapshotFailed", what="snapshot", trigger="after", **facts)
    drawn = chart([*boot(), failed])
    assert drawn.instants[-1].label == "snapshot.failed after"
    assert drawn.instants[-1].reason == "SnapshotFailed, snapshot: expected a path\\x0a, found it there, state ready"
    assert drawn.notes[-1] == f"snapshot.failed after (at 200 ms): {drawn.instants[-1].reason}"


def test_of_many_snapshots_that_failed_the_first_few_reasons_are_notes() -> None:
    failed = [line("snapshot.failed", n * MS, kind="CancelledError", what="snapshot") for n in range(1, 9)]
    notes = chart([*boot(), *failed]).notes
    assert notes[-2:] == (
        "snapshot.failed (at 5.00 ms): cancelled",
        "3 more snapshots failed",
    )


def test_a_restore_of_which_no_phase_is_in_the_file_has_its_stages_all_the_same() -> None:
    drawn = chart([line("restore.mapped", 10, duration_ns=4), line("restore.first_exit", 15, duration_ns=9)])
    assert (drawn.start_ns, drawn.end_ns, len(drawn.restore)) == (6, 15, 2)


def test_a_cancelled_boot_is_not_called_failed() -> None:
    cancelled = [phase("total", 0, 3 * MS, failed=True), line("vm.state", 3 * MS, state="stopped")]
    assert chart(cancelled).headline == "cancelled after 3.00 ms"
    assert chart(cancelled[:1]).headline == "cancelled after 3.00 ms"
    assert not chart(cancelled).recording.complete


def test_a_failure_whose_error_is_lost_is_one_by_its_state() -> None:
    lines = [phase("total", 0, 3 * MS, failed=True), line("vm.state", 3 * MS, state="failed")]
    assert chart(lines).headline == "failed after 3.00 ms"


def test_the_axis_is_the_total_and_what_comes_later_is_at_its_edge() -> None:
    drawn = chart([*boot(), line("guest.exit", 60_000 * MS, code=0)])
    assert (drawn.start_ns, drawn.end_ns, drawn.total_ns) == (MS, 100 * MS, 99 * MS)
    assert drawn.instants[-1].start_ns == 60_000 * MS
    assert drawn.place(60_000 * MS) == 1.0


def test_without_a_total_it_is_from_the_first_start_to_the_last_end_and_that_is_said() -> None:
    drawn = chart(boot(total=False))
    assert (drawn.start_ns, drawn.end_ns) == (MS, 97 * MS)
    assert any("no total phase" in note for note in drawn.notes)


@pytest.mark.parametrize("lines", [[line("guest.ready", 5)], [line("guest.boot_time", 5, stage="a", guest_ns=1)]])
def test_without_phases_the_axis_is_what_there_is(lines: list[bytes]) -> None:
    drawn = chart(lines)
    assert (drawn.start_ns, drawn.end_ns, len(drawn.rows)) == (0, 5, 1)


def test_a_vm_of_which_nothing_can_be_drawn_is_an_empty_chart() -> None:
    drawn = chart([line("guest.heartbeat", 1, counter=1)])
    assert (drawn.rows, drawn.total_ns, drawn.span_ns) == ((), 0, 1)
    assert drawn.headline == "no READY in 0 ns"


def test_each_attempt_is_told_apart() -> None:
    drawn = chart([phase("boot", 1, 2, failed=True), phase("boot", 5, 2, attempt=1), phase("total", 0, 9)])
    assert [(row.label, row.failed) for row in drawn.host[1:]] == [
        ("boot (attempt 0)", True),
        ("boot (attempt 1)", False),
    ]
    assert "2 boot attempts" in drawn.notes


def test_the_headline_says_what_became_of_the_boot() -> None:
    assert chart(boot()).headline == "total 99.0 ms on qemu, READY at 96.0 ms"
    failed = [phase("total", 0, 3 * MS, failed=True), line("vm.error", 1, what="no")]
    assert chart(failed).headline == "failed after 3.00 ms"


def test_the_commonest_exits_are_said() -> None:
    exits = {"io": 7, "mmio": 900, "hlt": 1, "a\n": 2, "b": 3, "c": 4}
    drawn = chart([line("vm.state", 5, state="stopped", exits=exits), phase("total", 0, 9)])
    assert drawn.notes == ("KVM exits: 900 mmio, 7 io, 4 c, 3 b, 2 a\\x0a",)


def test_lost_lines_and_missing_parents_are_said() -> None:
    notes = chart([phase("a", 1, 1, "gone\n"), line("log.lost", 1, lines=2)]).notes
    assert "parents that are not in the file: gone\\x0a" in notes
    assert "2 lines were lost on the way to the file: figures may be missing" in notes


def test_rows_without_end_are_cut_and_counted() -> None:
    phases = tuple(RecordedPhase("p", n, 1) for n in range(MAX_ROWS + 5))
    instants = tuple(RecordedInstant("i", n) for n in range(MAX_ROWS + 6))
    drawn = lay_out(attrs.evolve(Recording("f", "v"), phases=phases, instants=instants))
    assert (len(drawn.host), len(drawn.instants)) == (MAX_ROWS, MAX_ROWS)
    assert drawn.notes[-2:] == ("5 more phases are not drawn", "6 more instants are not drawn")
