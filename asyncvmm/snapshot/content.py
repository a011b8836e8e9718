"""What the files of a snapshot contain, read whole: their checksums, and zeros where there is no data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from asyncvmm.errors import SnapshotDamaged, SnapshotError
from asyncvmm.snapshot.extents import checksums, data_runs
from asyncvmm.snapshot.manifest import CHUNK_BYTES, FileRecord
from asyncvmm.snapshot.memory_map import Run

_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)


def problems_of(path: Path, fd: int, record: FileRecord, runs: tuple[Run, ...], end: int) -> Iterator[SnapshotDamaged]:
    """Everything that is wrong with the first ``end`` bytes of a file whose data is in ``runs``.

    Raises SnapshotError if it cannot be read.
    """
    try:
        yield from _wrong_sums(path, fd, record, runs, end)
        yield from _unexpected_data(path, fd, runs, end)
    except OSError as error:
        raise SnapshotError(str(path), expected="a file that can be read", found=error.strerror) from None


def _wrong_sums(path: Path, fd: int, record: FileRecord, runs: tuple[Run, ...], end: int) -> Iterator[SnapshotDamaged]:
    said = record.crc32 or ()
    count = 0
    for number, found in checksums(fd, runs, end):
        if count < len(said) and said[count] != found:
            what = _at(path, number * CHUNK_BYTES)
            yield SnapshotDamaged(what, expected=f"CRC-32 {said[count]:08x}", found=f"{found:08x}")
        count += 1
    if count != len(said):
        yield SnapshotDamaged(str(path), expected=f"{count} checksums", found=f"{len(said)} in the manifest")


def _unexpected_data(path: Path, fd: int, runs: tuple[Run, ...], end: int) -> Iterator[SnapshotDamaged]:
    """File systems may have data where nothing was written, but only zeros."""
    for start, stop in _gaps(data_runs(fd, end), runs, end):
        for at in range(start, stop, _PIECE_BYTES):
            found = os.pread(fd, min(_PIECE_BYTES, stop - at), at)
            if found != _ZEROS[: len(found)]:
                offset = at + len(found) - len(found.lstrip(b"\0"))
                yield SnapshotDamaged(_at(path, offset), expected="zeros", found=f"{found[offset - at]:#04x}")
                break


def _at(path: Path, offset: int) -> str:
    return f"{path}, offset {offset:#x}"


def _gaps(there: tuple[Run, ...], expected: tuple[Run, ...], end: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is in ``there`` and not in ``expected``; both ascending and apart."""
    runs = iter(expected)
    offset, size = next(runs, (end, 0))
    for start, length in there:
        stop = min(start + length, end)
        while start < stop:
            if offset + size <= start and offset < end:
                offset, size = next(runs, (end, 0))
                continue
            if start < (edge := min(stop, offset)):
                yield start, edge
            start = max(start, min(stop, offset + size) if offset < stop else stop)
