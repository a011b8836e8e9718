"""Groups of boots compared: medians, spreads, and a move only where it is larger than the spread."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncvmm.timing.chart import lay_out
from asyncvmm.timing.compare import Comparison, Delta, Line, Spread, compare, group
from asyncvmm.timing.compare_table import draw_comparison, group_text
from asyncvmm.timing.reading import read_recordings
from tests.support.recordings import MS, boot, line, phase, restore


def boots(*waits: int, total: bool = True) -> list[bytes]:
    return [event for n, wait in enumerate(waits) for event in boot(f"v{n}", wait, total=total)]


def compared(*files: Sequence[bytes]) -> Comparison:
    groups = []
    for number, lines in enumerate(files):
        name = f"{'abc'[number]}.jsonl"
        groups.append(group(name, [lay_out(one) for one in read_recordings(lines, name).recordings]))
    return compare(groups)


def find(comparison: Comparison, label: str) -> Line:
    (found,) = [line for line in comparison.lines if line.label == label]
    return found


def test_a_spread_is_median_range_and_from_four_boots_on_quartiles() -> None:
    assert Spread.of([5]) == Spread(1, 5, 5, 5)
    assert Spread.of([5, 1, 3]) == Spread(3, 3, 1, 5)
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(5, 3, 1, 5, (2, 4))
    assert [Spread.of(values).width for values in ([5], [5, 1], [1, 2, 3, 4, 5])] == [None, 4, 2]


def test_phases_stand_in_the_order_of_a_boot() -> None:
    comparison = compared(boots(80), boots(90))
    assert ["  " * line.depth + line.label for line in comparison.lines] == [
        "total",
        "  accel",
        "  setup",
        "  boot",
        "    qemu_fork",
        "    boot_wait",
        "    residual of boot",
        "  residual of total",
        "init_entry",
        "mounts_done",
        "uart_access_done",
        "init_ok",
        "ready",
        "command_loop",
    ]


def test_a_phase_that_moved_by_more_than_its_spread_is_named() -> None:
    comparison = compared(boots(80, 82, 81), boots(120, 121, 122))
    delta = find(comparison, "boot_wait").deltas[1]
    assert delta is not None
    assert (delta.ns, delta.verdict, delta.spread_ns) == (40 * MS, "moved", 2 * MS)
    assert comparison.conclusions == (
        "b.jsonl: total +40.0 ms (+40.0%), more than the spread (2.00 ms); the phase that moved most is boot_wait,"
        " +40.0 ms (+49.4%); the guest stage that moved most is init_entry, +40.0 ms (+65.6%)",
    )


def test_a_difference_within_the_spread_is_no_move() -> None:
    comparison = compared(boots(80, 100, 90), boots(95, 85, 99))
    delta = find(comparison, "boot_wait").deltas[1]
    assert delta is not None
    assert delta.verdict == "within spread"
    assert "within the spread (20.0 ms); no phase moved by more than its spread" in comparison.conclusions[0]


def test_restores_are_compared_by_their_stages_and_called_restores() -> None:
    comparison = compared(restore(), restore(guest_ms=60))
    assert find(comparison, "restore.first_guest_event").deltas[1] == Delta(20 * MS, 20 / 24, "spread unknown", None)
    assert [(line.label, line.depth) for line in comparison.lines[-3:]] == [
        ("restore.mapped", 0),
        ("restore.first_exit", 0),
        ("restore.first_guest_event", 0),
    ]
    (conclusion,) = comparison.conclusions
    assert "total +20.0 ms (+50.0%), one restore each" in conclusion
    assert "the restore stage that differs most is restore.first_guest_event, +20.0 ms" in conclusion
    assert group_text(comparison.groups[0]) == "a.jsonl: 1 restore, total from call to first guest event"
    cut_short = compared([*restore(), *restore("v1")[:-3]])
    assert group_text(cut_short.groups[0]) == "a.jsonl: 2 restores, total from call to the last stage of each"
    assert [one.path for one in comparison.lines[:2]] == [("total",), ("total", "restoring")]
    assert group_text(compared([*restore(), *boot("v1")]).groups[0]) == "a.jsonl: 2 VMs"


def test_of_single_boots_it_is_said_that_the_spread_is_unknown() -> None:
    (conclusion,) = compared(boots(80), boots(90)).conclusions
    assert "one boot each, so the spread is unknown; the phase that differs most is boot_wait, +10.0 ms" in conclusion


def test_one_boot_against_many_is_held_against_the_spread_of_the_many() -> None:
    delta = find(compared(boots(80), boots(70, 90, 100)), "boot_wait").deltas[1]
    assert delta is not None
    assert (delta.verdict, delta.spread_ns) == ("within spread", 30 * MS)


def test_the_same_boots_do_not_differ() -> None:
    comparison = compared(boots(80, 81), boots(80, 81))
    assert {delta.verdict for line in comparison.lines if (delta := line.deltas[1])} == {"within spread"}


def test_failed_boots_are_counted_and_left_out() -> None:
    failed = [phase("total", 0, 9000 * MS, None, "bad", failed=True), line("vm.error", 1, "bad", what="no")]
    comparison = compared([*boots(80, 82), *failed])
    assert (len(comparison.groups[0].charts), comparison.groups[0].left_out) == (2, 1)
    assert find(comparison, "total").spreads[0] == Spread(2, 100 * MS, 99 * MS, 101 * MS)


def test_a_group_without_a_good_boot_is_said_so() -> None:
    failed = [phase("total", 0, MS, failed=True), line("vm.error", 1, what="no")]
    assert compared(boots(80), failed).conclusions == ("b.jsonl: nothing to compare, b.jsonl has no successful boot",)
    assert compared(failed, boots(80)).conclusions == ("b.jsonl: nothing to compare, a.jsonl has no successful boot",)


def test_files_with_and_without_a_total_phase_are_compared_phase_by_phase() -> None:
    comparison = compared(boots(80), boots(80, total=False))
    delta = find(comparison, "boot_wait").deltas[1]
    assert delta is not None
    assert delta.ns == 0
    assert find(comparison, "total").spreads[1] == Spread(1, 96 * MS, 96 * MS, 96 * MS)


def test_a_phase_of_one_group_only_has_no_difference() -> None:
    found = find(compared(boots(80), [*boots(80), phase("kernel_load", 2 * MS, MS, "accel", "v0")]), "kernel_load")
    assert found.spreads[0] is None
    assert found.deltas == (None, None)


def test_a_boot_that_is_cut_short_is_left_out() -> None:
    comparison = compared([*boots(80, 82), *boot("cut", 500)[:4]])
    assert (len(comparison.groups[0].charts), comparison.groups[0].left_out) == (2, 1)


def test_what_a_retried_boot_did_once_is_compared_with_what_others_did_once() -> None:
    retried = [*boots(80), phase("boot", 0, MS, "total", "v0", failed=True)]
    again = [event.replace(b'"attempt":0', b'"attempt":1') if b'"boot' in event else event for event in boots(80)]
    comparison = compared(boots(80), [again[0], *again[1:], retried[-1]])
    assert find(comparison, "accel").spreads[0] == find(comparison, "accel").spreads[1]
    assert find(comparison, "boot (attempt 0)").spreads[0] is None


def test_an_earlier_attempt_is_a_line_of_its_own() -> None:
    retried = [phase("boot", 0, 5, "total"), phase("boot", 5, 9, "total", attempt=1), phase("total", 0, 14)]
    labels = [line.label for line in compared(retried).lines]
    assert labels == ["total", "boot (attempt 0)", "boot"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_shows_medians_spreads_and_moves(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal, color_system=None, markup=False)
    draw_comparison(compared(boots(80, 81, 82, 83, 84), boots(120, 121)), console)
    lines = [" ".join(text.split()) for text in out.getvalue().splitlines()]
    assert lines[:2] == ["[1] a.jsonl: 5 boots", "[2] b.jsonl: 2 boots"]
    assert lines[2] == "[1] min..max [2] min..max against [1]"
    assert "boot_wait 82.0 ms 80.0 ms..84.0 ms, IQR 2.00 ms 120 ms 120 ms..121 ms +38.5 ms (+47.0%) moved" in lines


def test_a_terminal_that_is_too_narrow_for_ranges_gets_none_and_is_told() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None, markup=False)
    draw_comparison(compared(boots(80, 81, 82, 83, 84), boots(120, 121)), console)
    lines = [text.rstrip() for text in out.getvalue().splitlines()]
    assert "ranges are left out: the terminal is too narrow for them" in lines
    assert "boot_wait 82.0 ms 120 ms +38.5 ms (+47.0%) moved" in [" ".join(text.split()) for text in lines]
    assert max(map(len, lines[:-1])) <= 80


def test_without_any_spread_there_is_no_column_for_it() -> None:
    out = io.StringIO()
    draw_comparison(compared(boots(80), boots(90)), Console(file=out, width=200))
    assert "min..max" not in out.getvalue()


@given(st.lists(st.lists(st.integers(21, 500), min_size=1, max_size=6), min_size=2, max_size=3))
def test_whatever_the_boots_medians_lie_in_their_ranges_and_verdicts_follow(files: list[list[int]]) -> None:
    comparison = compared(*(boots(*waits) for waits in files))
    for found in comparison.lines:
        for spread, delta in zip(found.spreads, found.deltas, strict=True):
            assert spread is not None
            assert spread.least <= spread.median <= spread.most
            if delta is not None and delta.spread_ns is not None:
                assert (delta.verdict == "moved") == (abs(delta.ns) > delta.spread_ns)


def test_an_absurd_stage_is_not_compared() -> None:
    absurd = [*boots(80), line("guest.boot_time", MS, "v0", stage="liar", guest_ns=(1 << 64) - 1)]
    comparison = compared(boots(80), absurd)
    assert not [one for one in comparison.lines if one.label == "liar"]
