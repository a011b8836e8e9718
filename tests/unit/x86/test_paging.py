from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.x86.layout import GIB, MIB, PAGE_SIZE, PAGE_TABLES
from asyncvmm.x86.paging import identity_page_tables


def translate(tables: bytes, address: int) -> int | None:
    """What the processor makes of a linear address, None for a page fault."""
    table = PAGE_TABLES
    for shift in (39, 30, 21):
        index = address >> shift & 511
        entry: int = struct.unpack_from("<Q", tables, table - PAGE_TABLES + index * 8)[0]
        if not entry & 1:
            return None
        if entry & 0x80:
            return entry & ~((1 << shift) - 1) | address & ((1 << shift) - 1)
        table = entry & ~0xFFF
    return None


@given(memory=st.integers(1, 3 * GIB), address=st.integers(0, 4 * GIB - 1))
def test_all_memory_is_mapped_onto_itself_and_nothing_beyond_its_last_gib(memory: int, address: int) -> None:
    tables = identity_page_tables(memory)
    mapped = -(-memory // GIB) * GIB
    assert translate(tables, address) == (address if address < mapped else None)


@pytest.mark.parametrize(("memory", "pages"), [(2 * MIB, 3), (GIB, 3), (GIB + 1, 4), (3 * GIB, 5)])
def test_there_is_one_page_directory_for_each_gib(memory: int, pages: int) -> None:
    assert len(identity_page_tables(memory)) == pages * PAGE_SIZE
