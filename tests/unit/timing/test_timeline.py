"""Phases nest, end with their block whatever happens, and add up."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.timeline import Phase, Span, Timeline


@pytest.fixture
def timeline() -> Timeline:
    """Its clock counts the looks at it: 0 is the start."""
    return Timeline(count().__next__)


def test_a_phase_lasts_as_long_as_its_block(timeline: Timeline) -> None:
    with timeline.phase("load"):
        timeline.clock()
    assert timeline.phases == [Phase("load", 1, 3)]
    assert timeline.phases[0].duration_ns == 2


def test_an_inner_phase_ends_first_and_knows_its_parent(timeline: Timeline) -> None:
    with timeline.phase("outer"), timeline.phase("inner"):
        pass
    assert timeline.phases == [Phase("inner", 2, 3, "outer"), Phase("outer", 1, 4, residual_ns=2)]


def test_a_phase_that_raises_is_recorded_as_failed(timeline: Timeline) -> None:
    with pytest.raises(ZeroDivisionError), timeline.phase("outer"), timeline.phase("inner"):
        raise ZeroDivisionError
    assert [(phase.name, phase.failed) for phase in timeline.phases] == [("inner", True), ("outer", True)]
    with timeline.phase("next"):
        pass
    assert timeline.phases[-1].parent is None


def test_a_span_that_failed_is_a_phase_that_failed(timeline: Timeline) -> None:
    timeline.record(Span("memory", 2, 5, (Span("memory_alloc", 3, 4, failed=True),), failed=True))
    assert [(phase.name, phase.failed) for phase in timeline.phases] == [("memory_alloc", True), ("memory", True)]


def test_spans_recorded_later_are_worked_out_when_their_phase_ends_or_somebody_looks(timeline: Timeline) -> None:
    worked_out = []

    def spans() -> tuple[Span, ...]:
        worked_out.append(True)
        return Span("alloc", 2, 3), Span("register", 3, 4)

    with timeline.phase("memory"):
        timeline.record_later(spans)
        assert not worked_out
    assert [(phase.name, phase.parent) for phase in timeline.phases] == [
        ("alloc", "memory"),
        ("register", "memory"),
        ("memory", None),
    ]
    timeline.record_later(spans)
    assert [phase.name for phase in timeline.phases[3:]] == ["alloc", "register"]
    assert len(worked_out) == 2


def test_durations_of_one_name_add_up(timeline: Timeline) -> None:
    for _ in range(3):
        with timeline.phase("again"):
            pass
    assert timeline.durations() == {"again": 3}


def test_what_has_elapsed_includes_the_phases_that_are_open(timeline: Timeline) -> None:
    with timeline.phase("again"):
        pass
    with timeline.phase("outer"), timeline.phase("again"):
        assert timeline.durations() == {"again": 1}
        assert timeline.elapsed() == {"again": 1 + 1, "outer": 2}
    assert timeline.elapsed() == timeline.durations()


def test_what_the_children_do_not_account_for_is_the_residual(timeline: Timeline) -> None:
    with timeline.phase("outer"):
        for _ in range(2):
            with timeline.phase("inner"):
                timeline.clock()
    outer = timeline.phases[-1]
    assert (outer.duration_ns, outer.residual_ns) == (7, 3)
    assert timeline.phases[0].residual_ns is None


def test_spans_timed_elsewhere_become_phases_of_the_open_one(timeline: Timeline) -> None:
    with timeline.phase("outer"):
        timeline.record(Span("memory", 10, 20, (Span("alloc", 10, 12), Span("register", 13, 20))))
    assert timeline.phases == [
        Phase("alloc", 10, 12, "memory"),
        Phase("register", 13, 20, "memory"),
        Phase("memory", 10, 20, "outer", residual_ns=1),
        Phase("outer", 1, 2, residual_ns=0),
    ]


def test_a_residual_is_never_negative(timeline: Timeline) -> None:
    timeline.record(Span("outer", 0, 1, (Span("one", 0, 1), Span("other", 0, 1))))
    assert timeline.phases[-1].residual_ns == 0


Tree = dict[str, "Tree"]
trees: st.SearchStrategy[Tree] = st.recursive(
    st.just({}), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


def walk(timeline: Timeline, tree: Tree) -> None:
    for name, inner in tree.items():
        with timeline.phase(name):
            walk(timeline, inner)


def names(tree: Tree) -> Iterator[str]:
    for name, inner in tree.items():
        yield name
        yield from names(inner)


@given(trees)
def test_every_phase_is_recorded_once_and_inside_its_parent(tree: Tree) -> None:
    timeline = Timeline(count().__next__)
    walk(timeline, tree)
    assert sorted(phase.name for phase in timeline.phases) == sorted(names(tree))
    for number, phase in enumerate(timeline.phases):
        if phase.parent is not None:
            parent = next(later for later in timeline.phases[number + 1 :] if later.end_ns > phase.end_ns)
            while parent.name != phase.parent or parent.start_ns > phase.start_ns:
                parent = next(later for later in timeline.phases if later.end_ns > parent.end_ns)
            assert parent.start_ns < phase.start_ns < phase.end_ns < parent.end_ns
