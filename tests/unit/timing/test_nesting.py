"""Phases find what they lie in from their times and names; what is left over is counted; no file can make a circle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.nesting import MAX_DEPTH, Node, nest, walk
from asyncvmm.timing.recording import RecordedPhase as Phase


def tree(*phases: Phase) -> list[tuple[int, str]]:
    return [(node.depth, node.phase.name) for node in walk(nest(phases)[0])]


def find(name: str, *phases: Phase) -> Node:
    return next(node for node in walk(nest(phases)[0]) if node.phase.name == name)


def test_phases_stand_below_the_one_they_are_in_by_start() -> None:
    nested = tree(Phase("b", 5, 2, "top"), Phase("in a", 2, 1, "a"), Phase("a", 1, 3, "top"), Phase("top", 0, 9))
    assert nested == [(0, "top"), (1, "a"), (2, "in a"), (1, "b")]


def test_of_two_with_one_name_the_one_that_is_open_is_the_parent() -> None:
    phases = [Phase("boot", 0, 5), Phase("x", 1, 1, "boot"), Phase("boot", 10, 5), Phase("y", 11, 1, "boot")]
    assert tree(*phases) == [(0, "boot"), (1, "x"), (0, "boot"), (1, "y")]


def test_a_phase_that_is_as_long_as_its_parent_lies_in_it() -> None:
    assert tree(Phase("in", 1, 5, "out", line=1), Phase("out", 1, 5, line=2)) == [(0, "out"), (1, "in")]


def test_a_parent_that_is_not_there_is_named_and_its_children_stand_at_the_top() -> None:
    tops, missing = nest([Phase("a", 0, 1, "gone"), Phase("b", 2, 1, "gone"), Phase("c", 2, 1)])
    assert [node.phase.name for node in tops] == ["a", "b", "c"]
    assert missing == ["gone"]


@pytest.mark.parametrize("times", [(1, 1), (1, 2), (2, 1)])
def test_phases_that_are_each_others_parent_do_not_hang_it(times: tuple[int, int]) -> None:
    assert len(tree(Phase("a", times[0], 3, "b"), Phase("b", times[1], 3, "a"), Phase("c", 1, 1, "c"))) == 3


def test_what_is_nested_without_end_stands_on_the_last_level() -> None:
    phases = [Phase("a", n, 100_000 - 2 * n, "a") for n in range(5000)]
    assert max(depth for depth, _ in tree(*phases)) == MAX_DEPTH - 1


def test_the_residual_is_the_files_else_counted_and_never_more_than_the_phase() -> None:
    children = [Phase("a", 1, 2, "top"), Phase("b", 5, 3, "top")]
    assert find("top", Phase("top", 0, 10, residual_ns=4), *children).residual_ns == 4
    assert find("top", Phase("top", 0, 10), *children).residual_ns == 5
    assert find("top", Phase("top", 0, 10, residual_ns=999), *children).residual_ns == 10
    assert find("a", *children).residual_ns == 0


def test_the_gaps_are_where_no_child_ran() -> None:
    children = [Phase("a", 1, 2, "top"), Phase("b", 2, 3, "top"), Phase("c", 7, 3, "top")]
    assert find("top", Phase("top", 0, 12), *children).gaps() == ((0, 1), (5, 7), (10, 12))


names = st.sampled_from("abc")
phases = st.builds(Phase, names, st.integers(0, 9), st.integers(0, 9), st.none() | names, line=st.integers(0, 9))


@given(st.lists(phases, max_size=12))
def test_every_phase_is_in_the_tree_once(some: list[Phase]) -> None:
    tops, _ = nest(some)
    assert sorted(map(repr, (node.phase for node in walk(tops)))) == sorted(map(repr, some))
    for node in walk(tops):
        assert 0 <= node.residual_ns <= node.phase.duration_ns
        assert all(start < end for start, end in node.gaps())
