"""What the files of a snapshot contain, read whole: their checksums, and zeros where there is no data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from asyncvmm.errors import SnapshotDamaged, SnapshotError
from asyncvmm.snapshot.extents import checksums, data_runs
from asyncvmm.snapshot.manifest import CHUNK_BYTES, FileRecord
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)
_GAPS_LOOKED_INTO = 64


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


def glimpsed_data(path: Path, fd: int, runs: tuple[Run, ...], end: int) -> SnapshotDamaged | None:
    """What is to be seen at a glance of data beside ``runs``: of the first few gaps, the first page. Raises OSError."""
    begin = 0
    for offset, size in (*runs[:_GAPS_LOOKED_INTO], (end, 0))[:_GAPS_LOOKED_INTO]:
        if begin < offset and (at := _data_from(fd, begin, offset)) is not None:
            page = os.pread(fd, min(PAGE_BYTES, offset - at), at)
            if page.strip(b"\0"):
                return _not_zeros(path, at, page)
        begin = offset + size
    return None


def _data_from(fd: int, begin: int, end: int) -> int | None:
    try:
        at = os.lseek(fd, begin, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data from there on
            raise
        return None
    return at if at < end else None


def _unexpected_data(path: Path, fd: int, runs: tuple[Run, ...], end: int) -> Iterator[SnapshotDamaged]:
    """File systems may have data where nothing was written, but only zeros."""
    for start, stop in _gaps(data_runs(fd, end), runs, end):
        for at in range(start, stop, _PIECE_BYTES):
            found = os.pread(fd, min(_PIECE_BYTES, stop - at), at)
            if found != _ZEROS[: len(found)]:
                yield _not_zeros(path, at, found)
                break


def _not_zeros(path: Path, at: int, found: bytes) -> SnapshotDamaged:
    rest = found.lstrip(b"\0")
    return SnapshotDamaged(_at(path, at + len(found) - len(rest)), expected="zeros", found=f"{rest[0]:#04x}")


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
