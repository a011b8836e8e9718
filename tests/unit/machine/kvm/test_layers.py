"""Pieces laid over each other give what the layers, laid over each other, hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.machine.kvm import layers
from asyncvmm.machine.kvm.layers import LEAST_HOLE_BYTES, MOST_HOLES, MOST_MAPPINGS, arrange
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap, Run

PAGES = 512
SIZE = PAGES * PAGE_BYTES

page_sets = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 100)), max_size=6).map(
    lambda spans: {page for start, count in spans for page in range(start, min(PAGES, start + count))}
)


def runs(pages: set[int]) -> tuple[Run, ...]:
    return layers_runs(bytes(page in pages for page in range(PAGES)))


def layers_runs(marks: bytes) -> tuple[Run, ...]:
    from asyncvmm.snapshot.memory_map import runs_of

    return runs_of(marks, 1)


def full(data: set[int]) -> MemoryMap:
    return MemoryMap(size=SIZE, data=runs(data))


def difference(data: set[int], zero: set[int]) -> MemoryMap:
    return MemoryMap(size=SIZE, data=runs(data), zero=runs(zero - data), is_difference=True)


maps = st.tuples(st.builds(full, page_sets), st.lists(st.builds(difference, page_sets, page_sets), max_size=4)).map(
    lambda parts: [parts[0], *parts[1]]
)


def pages_of(found: tuple[Run, ...]) -> set[int]:
    return {page for offset, size in found for page in range(offset // PAGE_BYTES, (offset + size) // PAGE_BYTES)}


def origin_of_each_page(stack: list[MemoryMap]) -> list[int | None]:
    """The layer that each page is from; None is zeros."""
    base = pages_of(stack[0].data)
    found: list[int | None] = [0 if page in base else None for page in range(PAGES)]
    for index, layer in enumerate(stack[1:], 1):
        for page in pages_of(layer.zero):
            found[page] = None
        for page in pages_of(layer.data):
            found[page] = index
    return found


@given(maps)
def test_every_page_is_what_the_newest_layer_that_knows_it_says(stack: list[MemoryMap]) -> None:
    found: list[int | None] = [None] * PAGES
    for piece in arrange(SIZE, stack):
        assert piece.size > 0
        for page in pages_of(((piece.offset, piece.size),)):
            found[page] = piece.layer
    base = pages_of(stack[0].data)
    seen = [None if layer == 0 and page not in base else layer for page, layer in enumerate(found)]
    assert seen == origin_of_each_page(stack)


def test_a_large_hole_is_not_mapped_from_the_file() -> None:
    hole = LEAST_HOLE_BYTES // PAGE_BYTES
    data = {0, 1, 2 + hole}
    pieces = arrange(SIZE, [full(data)])
    assert [(piece.offset, piece.size) for piece in pieces] == [
        (0, 2 * PAGE_BYTES),
        ((2 + hole) * PAGE_BYTES, PAGE_BYTES),
    ]


def test_an_empty_file_is_not_mapped_at_all() -> None:
    assert arrange(SIZE, [full(set())]) == ()


def test_a_small_hole_is_mapped_with_what_surrounds_it() -> None:
    small = LEAST_HOLE_BYTES // PAGE_BYTES - 1
    (piece,) = arrange(
        (small + 2) * PAGE_BYTES,
        [MemoryMap(size=(small + 2) * PAGE_BYTES, data=((0, PAGE_BYTES), ((small + 1) * PAGE_BYTES, PAGE_BYTES)))],
    )
    assert piece.size == (small + 2) * PAGE_BYTES


def test_a_base_full_of_holes_takes_a_bounded_number_of_mappings() -> None:
    step = 2 * LEAST_HOLE_BYTES
    count = 40 * MOST_HOLES
    data = tuple((index * step, PAGE_BYTES) for index in range(count))
    assert len(arrange(count * step, [MemoryMap(size=count * step, data=data)])) <= MOST_HOLES + 1


def test_the_smallest_pieces_beyond_a_bound_are_copied() -> None:
    count = MOST_MAPPINGS + 100
    size = 4 * count * PAGE_BYTES
    data = tuple((4 * index * PAGE_BYTES, (1 + (index >= 100)) * PAGE_BYTES) for index in range(count))
    stack = [MemoryMap(size=size, data=((0, size),)), MemoryMap(size=size, data=data, is_difference=True)]
    pieces = arrange(size, stack)
    copied = [piece for piece in pieces if piece.is_copied]
    assert len(copied) == 100
    assert all(piece.size == PAGE_BYTES for piece in copied)
    assert not pieces[0].is_copied


@pytest.mark.parametrize(
    ("stack", "error"),
    [
        ([], SnapshotMismatch),
        ([difference({1}, set())], SnapshotMismatch),
        ([full({1})] + [difference({1}, set())] * layers.MOST_LAYERS, SnapshotMismatch),
        ([full({1}), MemoryMap(size=SIZE + PAGE_BYTES, is_difference=True)], SnapshotDamaged),
        ([MemoryMap(size=SIZE, data=((SIZE, PAGE_BYTES),))], SnapshotDamaged),
        ([MemoryMap(size=SIZE, data=((1, PAGE_BYTES),))], SnapshotDamaged),
        ([MemoryMap(size=SIZE, data=((-PAGE_BYTES, PAGE_BYTES),))], SnapshotDamaged),
        ([MemoryMap(size=SIZE, data=((0, 0),))], SnapshotDamaged),
    ],
)
def test_maps_that_do_not_fit_are_refused(stack: list[MemoryMap], error: type[Exception]) -> None:
    with pytest.raises(error):
        arrange(SIZE, stack)
