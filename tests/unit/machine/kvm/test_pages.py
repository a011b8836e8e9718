"""A set of pages is what was put into it, in whichever form."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.pages import PageSet, joined, total
from asyncvmm.snapshot.memory_map import PAGE_BYTES

PAGES = 200
SIZE = PAGES * PAGE_BYTES

numbers = st.sets(st.integers(0, PAGES - 1))
dense = st.builds(
    lambda start, count: set(range(start, min(PAGES, start + count))), numbers.map(len), st.integers(0, 99)
)
sets = numbers | dense


def numbers_in(pages: PageSet) -> set[int]:
    return {
        page for offset, size in pages.runs() for page in range(offset // PAGE_BYTES, (offset + size) // PAGE_BYTES)
    }


def of(wanted: set[int]) -> PageSet:
    pages = PageSet(SIZE)
    pages.add_runs((page * PAGE_BYTES, PAGE_BYTES) for page in wanted)
    return pages


@given(sets)
def test_runs_are_ascending_and_apart_and_all_of_it(wanted: set[int]) -> None:
    pages = of(wanted)
    runs = pages.runs()
    assert numbers_in(pages) == wanted
    assert len(pages) == len(wanted) == total(runs) // PAGE_BYTES
    assert all(offset + size < following for (offset, size), (following, _) in pairwise(runs))


@given(sets, sets)
def test_sets_are_joined(first: set[int], second: set[int]) -> None:
    pages = of(first)
    pages.update(of(second))
    assert numbers_in(pages) == first | second


@given(sets, st.integers(0, 3))
def test_a_bitmap_counts_from_the_lowest_bit_on(wanted: set[int], beyond: int) -> None:
    """Bits behind the last page, which fill the last word, say nothing."""
    bits = sum(1 << page for page in wanted) | beyond << PAGES
    pages = PageSet(SIZE)
    pages.add_bits(bits.to_bytes(-(-PAGES // 64) * 8, "little"), 0, SIZE)
    assert numbers_in(pages) == wanted


@given(sets)
def test_a_bitmap_may_be_that_of_a_later_part(wanted: set[int]) -> None:
    pages = PageSet(2 * SIZE)
    bits = sum(1 << page for page in wanted)
    pages.add_bits(bits.to_bytes(-(-PAGES // 64) * 8, "little"), SIZE, SIZE)
    assert numbers_in(pages) == {page + PAGES for page in wanted}


@given(sets, sets)
def test_pages_are_taken_in_by_number(before: set[int], wanted: set[int]) -> None:
    pages = of(before)
    pages.add_numbers([*wanted, *wanted])
    assert numbers_in(pages) == before | wanted


@given(sets)
def test_marks_are_a_byte_for_each_page(wanted: set[int]) -> None:
    pages = PageSet(SIZE + PAGE_BYTES)
    pages.add_marks(bytes(page in wanted for page in range(PAGES)), PAGE_BYTES)
    assert numbers_in(pages) == {page + 1 for page in wanted}


@given(st.integers(0, SIZE - 1), st.integers(0, 5 * PAGE_BYTES))
def test_bytes_take_in_every_page_that_they_touch(offset: int, size: int) -> None:
    pages, size = PageSet(SIZE), min(size, SIZE - offset)
    pages.add(offset, size)
    assert numbers_in(pages) == {byte // PAGE_BYTES for byte in range(offset, offset + size)}


@given(sets)
def test_what_was_taken_is_not_there_any_more(wanted: set[int]) -> None:
    pages = of(wanted)
    before = pages.runs()
    assert pages.take() == before
    assert pages.runs() == []
    assert not len(pages)


@given(sets, st.integers(0, 3))
def test_runs_close_to_each_other_are_joined(wanted: set[int], gap: int) -> None:
    runs = of(wanted).runs()
    found = joined(runs, gap * PAGE_BYTES)
    assert wanted <= numbers_in(of(set()) if not found else _set(found))
    assert all(offset + size + gap * PAGE_BYTES < nxt for (offset, size), (nxt, _) in pairwise(found))


def _set(runs: list[tuple[int, int]]) -> PageSet:
    pages = PageSet(SIZE)
    pages.add_runs(runs)
    return pages
