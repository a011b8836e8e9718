"""Maps of memory as plain values, and maps laid over one another."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.lineage import merge
from asyncvmm.snapshot.memory_map import MOST_BYTES, PAGE_BYTES, MemoryMap, Run, runs_of, runs_to_plain

PAGES = 64
SIZE = PAGES * PAGE_BYTES
KINDS = st.binary(min_size=PAGES, max_size=PAGES).map(lambda kinds: bytes(kind % 3 for kind in kinds))


def full(kinds: bytes) -> MemoryMap:
    return MemoryMap(size=SIZE, data=runs_of(kinds, 1))


def difference(kinds: bytes) -> MemoryMap:
    return MemoryMap(size=SIZE, data=runs_of(kinds, 1), zero=runs_of(kinds, 2), is_difference=True)


@given(KINDS)
def test_maps_come_back(kinds: bytes) -> None:
    for one in (full(kinds), difference(kinds)):
        assert MemoryMap.from_plain(one.to_plain()) == one


@given(KINDS)
def test_runs_are_where_the_pages_are(kinds: bytes) -> None:
    pages = [page for offset, size in runs_of(kinds, 1) for page in range(offset, offset + size, PAGE_BYTES)]
    assert pages == [number * PAGE_BYTES for number, kind in enumerate(kinds) if kind == 1]
    assert full(kinds).data_bytes == len(pages) * PAGE_BYTES
    assert difference(kinds).zero_bytes == kinds.count(2) * PAGE_BYTES


@given(st.lists(KINDS, min_size=1, max_size=5))
def test_merged_layers_give_each_page_to_the_newest_that_has_it(layers: list[bytes]) -> None:
    owners: list[int | None] = [None] * PAGES
    for layer, kinds in enumerate(layers):
        for number, kind in enumerate(kinds):
            owners[number] = layer if kind == 1 else None if kind == 2 else owners[number]
    maps = [full(layers[0].replace(b"\2", b"\0")), *map(difference, layers[1:])]
    found: list[int | None] = [None] * PAGES
    end = 0
    for offset, size, layer in merge(maps):
        assert offset >= end
        end = offset + size
        for number in range(offset // PAGE_BYTES, end // PAGE_BYTES):
            found[number] = layer
    assert found == owners


def test_no_layers_are_nothing() -> None:
    assert merge([]) == ()


def plain(**changes: Any) -> dict[str, Any]:
    return {"size": SIZE, "is_difference": False, "data": [0, 1], "zero": []} | changes


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        plain(more=1),
        plain(size=0),
        plain(size=-PAGE_BYTES),
        plain(size=SIZE + 1),
        plain(size=float(SIZE)),
        plain(size=MOST_BYTES + PAGE_BYTES),
        plain(is_difference=1),
        plain(data=None),
        plain(data=[1]),
        plain(data=[0, 0]),
        plain(data=[-1, 1]),
        plain(data=[0, 1, 0, 1]),
        plain(data=[0, PAGES + 1]),
        plain(data=[PAGES, 1]),
        plain(data=[0, 1 << 70]),
        plain(data=[0, True]),
        plain(data=[0, 1.0]),
        plain(data=[0, "1"]),
        plain(data=[[0, 1]]),
        plain(zero=[1, 1]),
        plain(zero=[0, 1], is_difference=True),
        plain(data=[3, 5], zero=[7, 5], is_difference=True),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_is_damage(wrong: Any) -> None:
    with pytest.raises(SnapshotDamaged):
        MemoryMap.from_plain(wrong)


@given(st.lists(st.integers(-3, PAGES), max_size=8))
def test_any_numbers_are_runs_in_order_or_damage(numbers: list[int]) -> None:
    try:
        found = MemoryMap.from_plain(plain(data=numbers))
    except SnapshotDamaged:
        return
    end = -1
    for offset, size in found.data:
        assert offset > end
        assert size >= PAGE_BYTES
        end = offset + size
    assert end <= SIZE
    assert runs_to_plain(found.data) == numbers


def test_a_hundred_thousand_runs_are_read() -> None:
    runs: tuple[Run, ...] = tuple((2 * number * PAGE_BYTES, PAGE_BYTES) for number in range(100_000))
    one = MemoryMap(size=200_000 * PAGE_BYTES, data=runs)
    assert MemoryMap.from_plain(one.to_plain()) == one
