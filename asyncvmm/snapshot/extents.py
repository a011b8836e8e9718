"""Where a sparse file holds data, and the checksums of what it holds there (see manifest.py)."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor

from asyncvmm.snapshot.manifest import CHUNK_BYTES
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

Buffer = bytes | memoryview

_SMALL_BYTES = 1 << 16
"""Up to here a new buffer costs less than the call that fills one there."""


def data_runs(fd: int, size: int) -> tuple[Run, ...]:
    """The runs of whole pages that hold data, as the file system tells it. Raises OSError."""
    runs: list[Run] = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data from there on
                raise
            break
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        first = max(start - start % PAGE_BYTES, end)
        end = stop + -stop % PAGE_BYTES
        if runs and sum(runs[-1]) == first:
            first, _ = runs.pop()
        if end > first:
            runs.append((first, end - first))
    return tuple(runs)


def in_hole(fd: int, runs: Sequence[Run]) -> int | None:
    """The offset of the first byte of ``runs`` that lies in a hole of the file; None if there is none. Raises OSError.

    A file system that cannot tell says that there are no holes.
    """
    hole = 0
    for offset, size in runs:
        if hole < offset + size:
            hole = os.lseek(fd, offset, os.SEEK_HOLE)
        if hole < offset + size:
            return hole
    return None


def by_chunk(runs: Iterable[Run]) -> Iterator[tuple[int, list[Run]]]:
    """The chunks in which there is data, ascending, and the runs of each, cut at its ends."""
    number, inside = -1, list[Run]()
    for offset, size in runs:
        while size:
            chunk = offset // CHUNK_BYTES
            part = min(size, (chunk + 1) * CHUNK_BYTES - offset)
            if chunk != number:
                if inside:
                    yield number, inside
                number, inside = chunk, []
            inside.append((offset, part))
            offset, size = offset + part, size - part
    if inside:
        yield number, inside


def checksums(fd: int, runs: Iterable[Run], end: int) -> Iterator[tuple[int, int]]:
    """Each chunk with data, and the CRC-32 of that. Nothing is read at ``end`` or behind it. Raises OSError.

    What the file has no more of counts as nothing.
    """
    return _checksums(fd, by_chunk(runs), end)


def checksums_in(executor: Executor, threads: int, fd: int, runs: Iterable[Run], end: int) -> list[tuple[int, int]]:
    """The same by that many threads of ``executor``, each taking the next chunk that none has taken. Raises OSError."""
    chunks = iter(list(by_chunk(runs)))  # a list's iterator may be shared by threads, a generator may not
    parts = [executor.submit(lambda: list(_checksums(fd, chunks, end))) for _ in range(threads)]
    return sorted(pair for part in parts for pair in part.result())


def _checksums(fd: int, chunks: Iterable[tuple[int, list[Run]]], end: int) -> Iterator[tuple[int, int]]:
    with memoryview(bytearray(CHUNK_BYTES)) as buffer:
        for number, inside in chunks:
            checksum = 0
            for offset, size in inside:
                size = min(size, end - offset)
                if size > _SMALL_BYTES:
                    data: Buffer = buffer[: os.preadv(fd, [buffer[:size]], offset)]
                else:
                    data = os.pread(fd, size, offset)
                checksum = zlib.crc32(data, checksum)
            yield number, checksum
