from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.metrics.counters import LatencyAggregate, MetricGroup, added_up, counter, kinds, store, times


class Kitchen(MetricGroup):
    eggs: int = counter("eggs boiled")
    degrees: int = store("heat of the water")
    boiling: LatencyAggregate = times("time in the water")


@pytest.fixture
def kitchen() -> Kitchen:
    return Kitchen()


def test_a_counter_tells_what_came_since_the_last_flush(kitchen: Kitchen) -> None:
    kitchen.eggs += 3
    assert kitchen.flush()["eggs"] == 3
    assert kitchen.flush()["eggs"] == 0
    kitchen.eggs += 2
    assert kitchen.flush()["eggs"] == 2
    assert kitchen.eggs == 5


def test_a_store_keeps_its_value(kitchen: Kitchen) -> None:
    kitchen.degrees = 100
    assert kitchen.flush()["degrees"] == kitchen.flush()["degrees"] == 100
    kitchen.degrees = 20
    assert kitchen.flush()["degrees"] == 20


def test_an_aggregate_keeps_its_extremes_and_tells_the_sum_since_the_last_flush(kitchen: Kitchen) -> None:
    for us in (7, 3, 5):
        kitchen.boiling.record(us)
    assert kitchen.flush()["boiling"] == {"min_us": 3, "max_us": 7, "sum_us": 15}
    kitchen.boiling.record(9)
    assert kitchen.flush()["boiling"] == {"min_us": 3, "max_us": 9, "sum_us": 9}
    assert kitchen.flush()["boiling"] == {"min_us": 3, "max_us": 9, "sum_us": 0}


def test_a_group_is_flushed_in_the_order_of_its_fields(kitchen: Kitchen) -> None:
    assert list(kitchen.flush()) == ["eggs", "degrees", "boiling"]


def test_two_groups_of_a_class_share_nothing() -> None:
    one, other = Kitchen(), Kitchen()
    one.eggs += 1
    one.boiling.record(1)
    one.flush()
    assert other.flush() == {"eggs": 0, "degrees": 0, "boiling": {"min_us": 0, "max_us": 0, "sum_us": 0}}


def test_a_misspelt_field_is_an_error(kitchen: Kitchen) -> None:
    with pytest.raises(AttributeError):
        kitchen.egs = 1  # type: ignore[attr-defined]


def test_a_group_shows_what_is_not_0(kitchen: Kitchen) -> None:
    kitchen.degrees = 90
    assert repr(kitchen).startswith("Kitchen(degrees=90, boiling=")


def test_a_group_made_from_another_has_its_fields_first() -> None:
    class Canteen(Kitchen):
        plates: int = counter("plates filled")

    canteen = Canteen()
    canteen.plates += 2
    canteen.eggs += 1
    flushed = canteen.flush()
    assert list(flushed) == ["eggs", "degrees", "boiling", "plates"]
    assert (flushed["eggs"], flushed["plates"]) == (1, 2)
    assert list(kinds(Kitchen)) == ["eggs", "degrees", "boiling"]


def test_a_counter_that_begins_anew_counts_from_0(kitchen: Kitchen) -> None:
    kitchen.eggs = kitchen.boiling.sum_us = 10
    kitchen.flush()
    kitchen.begin_anew()
    kitchen.eggs = kitchen.boiling.sum_us = 4
    assert kitchen.flush() == {"eggs": 4, "degrees": 0, "boiling": {"min_us": 0, "max_us": 0, "sum_us": 4}}


def test_a_total_that_steps_back_tells_nothing_twice(kitchen: Kitchen) -> None:
    told = []
    for total in (10, 9, 12):
        kitchen.eggs = kitchen.boiling.sum_us = total
        flushed = kitchen.flush()
        told.append((flushed["eggs"], flushed["boiling"]))
    times_us = [{"min_us": 0, "max_us": 0, "sum_us": us} for us in (10, 0, 2)]
    assert told == list(zip((10, 0, 2), times_us, strict=True))


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.booleans())))
def test_flushes_add_up_to_the_total(steps: list[tuple[int, bool]]) -> None:
    kitchen, told, told_us = Kitchen(), 0, 0
    for amount, flush in [*steps, (0, True)]:
        kitchen.eggs += amount
        kitchen.boiling.record(amount)
        if flush:
            flushed = kitchen.flush()
            told += flushed["eggs"] if isinstance(flushed["eggs"], int) else 0
            told_us += flushed["boiling"]["sum_us"] if isinstance(flushed["boiling"], dict) else 0
    assert told == told_us == kitchen.eggs == kitchen.boiling.sum_us == sum(amount for amount, _ in steps)


@given(st.lists(st.integers(1, 1 << 40), min_size=1))
def test_an_aggregate_finds_the_least_and_the_greatest(times_us: list[int]) -> None:
    aggregate = LatencyAggregate()
    for us in times_us:
        aggregate.record(us)
    assert aggregate.flush() == {"min_us": min(times_us), "max_us": max(times_us), "sum_us": sum(times_us)}


def test_updates_leave_nothing_behind_but_integers(kitchen: Kitchen) -> None:
    def work() -> None:
        for us in range(1000, 6000):
            kitchen.eggs += us
            kitchen.boiling.record(us)

    work()
    before = sys.getallocatedblocks()
    work()
    assert sys.getallocatedblocks() - before < 50


def test_the_sum_of_groups_adds_numbers_and_joins_aggregates() -> None:
    one, other = Kitchen(), Kitchen()
    one.eggs, other.eggs = 1, 2
    for us in (4, 9):
        one.boiling.record(us)
    other.boiling.record(6)
    assert added_up([one.flush(), other.flush()]) == {
        "eggs": 3,
        "degrees": 0,
        "boiling": {"min_us": 4, "max_us": 9, "sum_us": 19},
    }
    assert added_up([]) == {}


def test_an_aggregate_without_any_record_is_no_minimum_of_a_sum() -> None:
    idle, busy = Kitchen(), Kitchen()
    busy.boiling.record(8)
    assert added_up([idle.flush(), busy.flush()])["boiling"] == {"min_us": 8, "max_us": 8, "sum_us": 8}


def test_the_sum_is_not_the_parts_own_dict() -> None:
    part = Kitchen().flush()
    total = added_up([part])
    assert total == part
    assert total["boiling"] is not part["boiling"]
