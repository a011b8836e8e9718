"""The guest's memory statistics."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.balloon.stats import MOST_ENTRIES, STATISTICS, BalloonStats, parse_statistics

ENTRIES = st.lists(st.tuples(st.integers(0, 0xFFFF) | st.integers(0, 9), st.integers(0, (1 << 64) - 1)), max_size=64)


def packed(*entries: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in entries)


def test_each_tag_has_the_name_that_firecracker_gives_it() -> None:
    assert parse_statistics(packed(*((tag, 100 + tag) for tag in range(10)))) == {
        "swap_in": 100,
        "swap_out": 101,
        "major_faults": 102,
        "minor_faults": 103,
        "free_memory": 104,
        "total_memory": 105,
        "available_memory": 106,
        "disk_caches": 107,
        "hugetlb_allocations": 108,
        "hugetlb_failures": 109,
    }


@given(ENTRIES)
def test_unknown_tags_are_ignored_and_the_last_of_one_tag_counts(entries: list[tuple[int, int]]) -> None:
    known = {STATISTICS[tag]: value for tag, value in entries if tag < 10}
    assert parse_statistics(packed(*entries)) == known


@pytest.mark.parametrize("size", [1, 9, 11, (MOST_ENTRIES + 1) * 10])
def test_a_buffer_that_is_not_whole_entries_or_too_long_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"found {size} bytes"):
        parse_statistics(bytes(size))


def test_a_record_tells_pages_and_mib_and_leaves_out_what_the_guest_did_not_say() -> None:
    stats = BalloonStats(target_pages=25600, actual_pages=511, free_memory=4096)
    assert stats.to_dict() == {
        "target_mib": 100,
        "actual_mib": 1,
        "target_pages": 25600,
        "actual_pages": 511,
        "free_memory": 4096,
    }
