"""Which pages are there, and whose they are, as the kernel tells of real mappings."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from ctypes import addressof, c_char
from pathlib import Path

import pytest

from asyncvmm.machine.kvm import pagemap
from asyncvmm.machine.kvm.pagemap import pages_of
from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.snapshot.memory_map import PAGE_BYTES

PAGES = 300
SIZE = PAGES * PAGE_BYTES


@pytest.fixture
def anonymous() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        yield memory


@pytest.fixture
def of_file(tmp_path: Path) -> Iterator[mmap.mmap]:
    """Mapped privately, its pages in the page cache."""
    path = tmp_path / "memory"
    path.write_bytes(b"\1" * SIZE)
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        os.close(fd)
        yield memory


def looked_at(memory: mmap.mmap) -> tuple[PageSet, PageSet]:
    first = c_char.from_buffer(memory)
    try:
        return pages_of(addressof(first), SIZE)
    finally:
        del first


def has(pages: PageSet, page: int) -> bool:
    return any(offset <= page * PAGE_BYTES < offset + size for offset, size in pages.runs())


def test_of_untouched_memory_nothing_is_there(anonymous: mmap.mmap) -> None:
    present, own = looked_at(anonymous)
    assert (len(present), len(own)) == (0, 0)


def test_pages_that_were_written_are_there_and_own(anonymous: mmap.mmap) -> None:
    for page in (0, 5, 6, PAGES - 1):
        anonymous[page * PAGE_BYTES] = 1
    present, own = looked_at(anonymous)
    assert (
        present.runs()
        == own.runs()
        == [(0, PAGE_BYTES), (5 * PAGE_BYTES, 2 * PAGE_BYTES), (SIZE - PAGE_BYTES, PAGE_BYTES)]
    )


def test_a_page_of_a_file_is_own_once_it_was_written(of_file: mmap.mmap) -> None:
    assert of_file[10 * PAGE_BYTES] == 1
    of_file[200 * PAGE_BYTES] = 2
    present, own = looked_at(of_file)
    assert has(present, 10)
    assert has(present, 200)
    assert own.runs() == [(200 * PAGE_BYTES, PAGE_BYTES)]


def test_a_large_mapping_is_read_in_parts(anonymous: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_CHUNK_PAGES", 7)
    for page in range(0, PAGES, 3):
        anonymous[page * PAGE_BYTES] = 1
    _, own = looked_at(anonymous)
    assert own.runs() == [(page * PAGE_BYTES, PAGE_BYTES) for page in range(0, PAGES, 3)]


@pytest.mark.parametrize("content", [None, b""])
def test_where_the_kernel_does_not_say_every_page_is_both(
    anonymous: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "pagemap"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(pagemap, "PAGEMAP", path)
    present, own = looked_at(anonymous)
    assert present.runs() == own.runs() == [(0, SIZE)]
