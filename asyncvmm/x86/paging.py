"""Identity-mapped page tables for the 64-bit entry: 2 MiB pages over all RAM below the 32-bit hole.

Facts: Intel SDM volume 3, 4.5 (4-level paging).
"""

from __future__ import annotations

import struct

from asyncvmm.x86.layout import GIB, PAGE_SIZE, PAGE_TABLES

_ENTRIES = 512
_PRESENT_WRITABLE = 0x3
_LARGE = 0x80
_LARGE_PAGE = 2 << 20


def identity_page_tables(memory_bytes: int) -> bytes:
    """PML4, PDPT and page directories, to stand at PAGE_TABLES, that map 0..``memory_bytes`` (up to 512 GiB) onto
    itself, rounded up to whole GiB."""
    gibibytes = -(-memory_bytes // GIB)
    pdpt = PAGE_TABLES + PAGE_SIZE
    directory = pdpt + PAGE_SIZE
    return (
        _table([pdpt | _PRESENT_WRITABLE])
        + _table([(directory + index * PAGE_SIZE) | _PRESENT_WRITABLE for index in range(gibibytes)])
        + _directories(gibibytes)
    )


def _directories(gibibytes: int) -> bytes:
    pages = range(0, gibibytes * GIB, _LARGE_PAGE)
    return struct.pack(f"<{len(pages)}Q", *(page | _PRESENT_WRITABLE | _LARGE for page in pages))


def _table(entries: list[int]) -> bytes:
    return struct.pack(f"<{_ENTRIES}Q", *entries, *bytes(_ENTRIES - len(entries)))
