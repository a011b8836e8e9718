"""Page numbers as ranges: against the set of pages they name."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.balloon.pages import (
    MOST_PFNS,
    PAGE_BYTES,
    Range,
    coalesce,
    cut,
    parse_pfns,
    total,
    whole_pages,
    within_ram,
)

PFNS = st.lists(st.integers(0, 40) | st.integers(0, (1 << 32) - 1), max_size=50)
RANGES = st.lists(st.tuples(st.integers(0, 20 * PAGE_BYTES), st.integers(1, 5 * PAGE_BYTES)), max_size=10)


def pages(ranges: list[Range]) -> set[int]:
    assert all(address % PAGE_BYTES == size % PAGE_BYTES == 0 and size for address, size in ranges)
    return {page for address, size in ranges for page in range(address // PAGE_BYTES, (address + size) // PAGE_BYTES)}


@given(PFNS)
def test_coalesced_pages_are_the_same_pages_in_the_fewest_ranges(pfns: list[int]) -> None:
    ranges = coalesce(pfns)
    assert pages(ranges) == set(pfns)
    assert ranges == sorted(ranges)
    assert len(ranges) == sum(pfn - 1 not in pfns for pfn in set(pfns))


@given(PFNS)
def test_only_pages_in_ram_are_left_and_no_range_crosses_regions(pfns: list[int]) -> None:
    ram = [(0, 8 * PAGE_BYTES), (8 * PAGE_BYTES, 16 * PAGE_BYTES), (1 << 32, (1 << 32) + 4 * PAGE_BYTES)]
    inside = within_ram(coalesce(pfns), ram)
    in_ram = set(range(16)) | set(range(1 << 20, (1 << 20) + 4))
    assert pages(inside) == set(pfns) & in_ram
    assert all(any(s <= address and address + size <= e for s, e in ram) for address, size in inside)


@given(RANGES)
def test_whole_pages_lie_in_one_of_the_ranges_and_are_named_once(ranges: list[Range]) -> None:
    found = whole_pages(ranges)
    expected = {
        page for address, size in ranges for page in range(-(-address // PAGE_BYTES), (address + size) // PAGE_BYTES)
    }
    assert pages(found) == expected
    assert total(found) == len(expected) * PAGE_BYTES


@given(RANGES, st.integers(0, 60 * PAGE_BYTES), st.integers(0, 12))
def test_what_is_cut_in_two_is_the_same_together(ranges: list[Range], most: int, count: int) -> None:
    now, later = cut(ranges, most, count)
    assert total(now) == min(most, total(ranges[:count]))
    assert len(now) <= count
    joined = now + later
    if now and later and sum(now[-1]) == later[0][0] and len(joined) > len(ranges):
        joined = [*now[:-1], (now[-1][0], now[-1][1] + later[0][1]), *later[1:]]
    assert joined == ranges


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=20))
def test_page_numbers_are_little_endian_words(pfns: list[int]) -> None:
    assert parse_pfns(struct.pack(f"<{len(pfns)}I", *pfns)) == tuple(pfns)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 4 * MOST_PFNS + 4])
def test_a_request_that_is_not_some_page_numbers_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"found {size} bytes"):
        parse_pfns(bytes(size))
