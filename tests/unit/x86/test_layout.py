from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ConfigError, MemorySizeError
from asyncvmm.x86.layout import (
    E820_RAM,
    GIB,
    HOLE_END,
    HOLE_START,
    MIB,
    PAGE_SIZE,
    Region,
    e820_map,
    mmio_device,
    ram_regions,
)

memory_sizes = st.integers(2 * MIB // PAGE_SIZE, 16 * 1024 * GIB // PAGE_SIZE).map(lambda pages: pages * PAGE_SIZE)


@given(memory=memory_sizes)
def test_the_memory_map_is_sorted_and_does_not_overlap(memory: int) -> None:
    for lower, upper in pairwise(e820_map(memory)):
        assert lower.start + lower.size <= upper.start
    assert all(entry.size > 0 for entry in e820_map(memory))


@given(memory=memory_sizes)
def test_usable_memory_is_ram_outside_the_hole_and_the_bios_area(memory: int) -> None:
    usable = [entry for entry in e820_map(memory) if entry.type == E820_RAM]
    assert sum(entry.size for entry in usable) == memory - (0x100000 - 0x9FC00)
    assert all(entry.start + entry.size <= HOLE_START or entry.start >= HOLE_END for entry in usable)


@given(memory=memory_sizes)
def test_ram_regions_add_up(memory: int) -> None:
    assert sum(region.size for region in ram_regions(memory)) == memory


def test_ram_goes_around_the_hole() -> None:
    assert ram_regions(3 * GIB) == (Region(0, 3 * GIB),)
    assert ram_regions(5 * GIB) == (Region(0, 3 * GIB), Region(4 * GIB, 2 * GIB))


@pytest.mark.parametrize("memory", [0, -4096, MIB, 4 * MIB + 1])
def test_memory_that_cannot_be_is_refused(memory: int) -> None:
    with pytest.raises(MemorySizeError):
        ram_regions(memory)


def test_mmio_slots_have_their_own_page_and_line() -> None:
    devices = [mmio_device(slot) for slot in range(19)]
    assert (devices[0].address, devices[0].gsi) == (0xC0001000, 5)
    assert (devices[18].address, devices[18].gsi) == (0xC0013000, 23)
    with pytest.raises(ConfigError):
        mmio_device(19)
