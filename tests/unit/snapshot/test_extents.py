"""The checksums of a file's runs, chunk by chunk."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncvmm.snapshot.extents import checksums, checksums_in
from asyncvmm.snapshot.manifest import CHUNK_BYTES
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

CHUNKS = 6
SIZE = CHUNKS * CHUNK_BYTES


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def fd(data: bytes) -> Iterator[int]:
    made = os.memfd_create("memory")
    os.pwrite(made, data, 0)
    yield made
    os.close(made)


RUNS: list[tuple[Run, ...]] = [
    (),
    ((0, SIZE),),
    ((PAGE_BYTES, PAGE_BYTES), (CHUNK_BYTES - PAGE_BYTES, 3 * CHUNK_BYTES), (5 * CHUNK_BYTES, PAGE_BYTES)),
    tuple((offset, PAGE_BYTES) for offset in range(0, SIZE, 8 * PAGE_BYTES)),
]


@pytest.mark.parametrize("runs", RUNS)
def test_each_chunk_with_data_has_the_checksum_of_its_data(fd: int, data: bytes, runs: tuple[Run, ...]) -> None:
    expected: dict[int, int] = {}
    for offset, size in runs:
        for at in range(offset, offset + size, PAGE_BYTES):
            chunk = at // CHUNK_BYTES
            expected[chunk] = zlib.crc32(data[at : at + PAGE_BYTES], expected.get(chunk, 0))
    assert list(checksums(fd, runs, SIZE)) == sorted(expected.items())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("runs", RUNS)
def test_several_threads_come_to_the_same_checksums(fd: int, runs: tuple[Run, ...], threads: int) -> None:
    with ThreadPoolExecutor(2) as executor:
        assert checksums_in(executor, threads, fd, runs, SIZE) == list(checksums(fd, runs, SIZE))


def test_what_is_behind_the_end_counts_as_nothing(fd: int) -> None:
    end = CHUNK_BYTES + PAGE_BYTES
    with ThreadPoolExecutor(2) as executor:
        found = checksums_in(executor, 2, fd, [(0, 2 * CHUNK_BYTES)], end)
    assert found == list(checksums(fd, [(0, end)], SIZE))


def test_a_file_that_cannot_be_read_is_an_error_of_all_threads() -> None:
    fd = os.memfd_create("memory")
    os.close(fd)
    with ThreadPoolExecutor(2) as executor, pytest.raises(OSError, match="Bad file descriptor"):
        checksums_in(executor, 2, fd, [(0, SIZE)], SIZE)
