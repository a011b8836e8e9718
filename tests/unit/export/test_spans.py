"""A boot's records as a tree of spans, whatever their order, and whether it went well or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import BootError
from asyncvmm.events.types import VmError
from asyncvmm.export.records import NotARecord, Record, record_of
from asyncvmm.export.spans import MAX_STAGES, BootSpans, Span
from asyncvmm.timing.timeline import Timeline


def phase(name: str, start: int, end: int, parent: str | None = None, **fields: object) -> Record:
    times = {"t_ns": end, "start_ns": start, "duration_ns": end - start}
    return {"event": "phase", "name": name, "parent": parent, "attempt": 0, **times, **fields}


def state(now: str) -> Record:
    return {"event": "vm.state", "t_ns": 0, "state": now, "previous": "booting"}


def stage(name: str, t_ns: int, guest_ns: int) -> Record:
    return {"event": "guest.boot_time", "t_ns": t_ns, "stage": name, "guest_ns": guest_ns}


PROFILE: Record = {"event": "boot.profile", "t_ns": 100}
BOOT = (
    phase("accel", 1, 10, "total"),
    phase("setup", 10, 20, "total"),
    phase("vm_create", 21, 30, "boot"),
    phase("memory_register", 31, 33, "memory"),
    phase("memory_register", 34, 36, "memory"),
    phase("memory", 30, 40, "boot", residual_ns=6),
    stage("init_entry", 60, 5),
    stage("ready", 80, 25),
    phase("boot_wait", 40, 85, "boot"),
    phase("boot", 20, 90, "total", residual_ns=6),
    phase("total", 0, 91, residual_ns=2),
)


def tree_of(*records: Record) -> Span:
    spans = BootSpans()
    *first, last = records
    for record in first:
        assert spans.take(record) is None
    root = spans.take(last)
    assert root is not None
    return root


def shape(span: Span) -> object:
    return [span.name, *map(shape, span.children)] if span.children else span.name


def check_nesting(span: Span) -> None:
    for child in span.children:
        assert span.holds(child)
        check_nesting(child)


def test_phases_are_within_their_parents() -> None:
    root = tree_of(*BOOT, PROFILE)
    memory = ["memory", "memory_register", "memory_register"]
    assert shape(root) == ["total", "accel", "setup", ["boot", "vm_create", memory, "boot_wait"]]
    check_nesting(root)


def test_children_and_residual_sum_to_their_parent() -> None:
    for span in tree_of(*BOOT, PROFILE).walk():
        if "asyncvmm.residual_ns" in span.attributes:
            sums = sum(child.end_ns - child.start_ns for child in span.children)
            assert sums + int(span.attributes["asyncvmm.residual_ns"]) == span.end_ns - span.start_ns


def test_guest_stages_stand_where_the_host_waited() -> None:
    [wait] = [span for span in tree_of(*BOOT, PROFILE).walk() if span.name == "boot_wait"]
    assert [(instant.name, instant.t_ns) for instant in wait.instants] == [
        ("guest.init_entry", 60),
        ("guest.ready", 80),
    ]


def test_guest_stages_stand_at_their_own_time_where_the_guests_clock_is_known() -> None:
    clock = {"offset_ns": 50, "error_ns": 5, "source": "paired"}
    [wait] = [span for span in tree_of(*BOOT, {**PROFILE, "guest_clock": clock}).walk() if span.name == "boot_wait"]
    assert [(instant.t_ns, instant.attributes) for instant in wait.instants] == [
        (55, {"asyncvmm.guest_ns": 5}),
        (75, {"asyncvmm.guest_ns": 25}),
    ]


@pytest.mark.parametrize("offset_ns", [50, None])
def test_a_stage_of_an_absurd_time_stands_where_its_line_came(offset_ns: int | None) -> None:
    clock = None if offset_ns is None else {"offset_ns": offset_ns, "error_ns": 5, "source": "paired"}
    *before, end = BOOT
    root = tree_of(*before, stage("init_ok", 81, (1 << 64) - 1), end, {**PROFILE, "guest_clock": clock})
    [absurd] = [instant for span in root.walk() for instant in span.instants if instant.name == "guest.init_ok"]
    assert absurd.t_ns == 81
    assert all(value < 1 << 63 for value in absurd.attributes.values() if isinstance(value, int))


def test_a_boot_recorded_without_a_root_is_given_one() -> None:
    root = tree_of(phase("accel", 1, 10), phase("setup", 10, 20), phase("boot", 20, 90), state("stopped"))
    assert (root.name, root.start_ns, root.end_ns) == ("total", 1, 90)
    assert shape(root) == ["total", "accel", "setup", "boot"]


def test_a_phase_without_its_parent_is_the_roots() -> None:
    assert shape(tree_of(phase("x", 1, 2, "never"), phase("total", 0, 9), PROFILE)) == ["total", "x"]


def test_a_phase_beyond_the_root_is_not_cut() -> None:
    root = tree_of(phase("x", 5, 20, "total"), phase("total", 6, 9), PROFILE)
    assert (root.start_ns, root.end_ns, len(root.children)) == (5, 20, 2)
    check_nesting(root)


def test_attempts_are_apart() -> None:
    records = [
        phase(name, at, at + 5, above, attempt=at // 10)
        for at in (0, 10)
        for name, above in (("vm_create", "boot"), ("boot", "total"))
    ]
    root = tree_of(*records, phase("total", 0, 15, attempt=1), PROFILE)
    assert shape(root) == ["total", ["boot", "vm_create"], ["boot", "vm_create"]]
    assert [child.attributes["asyncvmm.attempt"] for child in root.children] == [0, 1]


def test_a_failed_boot_carries_the_errors_facts() -> None:
    error = BootError("boot", reason="panic", rip=0x1000, expected="READY", found="panic", serial_tail=b"secret")
    root = tree_of(
        phase("boot_wait", 1, 5, "boot", failed=True),
        phase("boot", 0, 5, "total", failed=True),
        record_of(VmError.of(9, error)),
        phase("total", 0, 6, failed=True),
        state("failed"),
    )
    assert [span.error is not None for span in root.walk()] == [True, True, True]
    assert root.error == "boot: expected READY, found panic"
    [exception] = root.instants
    assert exception.t_ns == 6
    assert exception.attributes["exception.type"] == "BootError"
    assert exception.attributes["asyncvmm.rip"] == "0x1000"
    assert "secret" not in repr(root)


def test_a_vm_that_never_booted_gives_nothing() -> None:
    spans = BootSpans()
    assert spans.take(state("stopped")) is None
    assert spans.take({"event": "serial.line", "t_ns": 1}) is None


def test_a_guest_that_repeats_itself_is_cut_short() -> None:
    root = tree_of(*[stage("ready", 1, number) for number in range(1000)], phase("total", 0, 9), PROFILE)
    assert len(root.instants) == MAX_STAGES


@pytest.mark.parametrize("name", ["start_ns", "duration_ns", "name", "attempt"])
def test_a_phase_that_lacks_a_field_is_refused(name: str) -> None:
    record = dict(phase("boot", 1, 2))
    del record[name]
    with pytest.raises(NotARecord, match=name):
        BootSpans().take(record)


@given(st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=4), max_leaves=20), st.booleans())
def test_any_nesting_of_phases_comes_back(shape_wanted: list[object], ticks: bool) -> None:
    """Phases of a real Timeline, all of the same name if it must be."""
    now = 0

    def clock() -> int:
        nonlocal now
        now += ticks
        return now

    timeline = Timeline(clock)

    def run(inner: list[object], depth: int) -> int:
        with timeline.phase("total" if not depth else f"p{depth}"):
            return 1 + sum(run(child, depth + 1) for child in inner if isinstance(child, list))

    count = run(shape_wanted, 0)
    spans = BootSpans()
    for done in timeline.phases:
        spans.take(phase(done.name, done.start_ns, done.end_ns, done.parent))
    root = spans.take(PROFILE)
    assert root is not None
    assert len(list(root.walk())) == count
    check_nesting(root)

    def bare(span: Span) -> list[object]:
        return [bare(child) for child in span.children]

    assert not ticks or bare(root) == shape_wanted
