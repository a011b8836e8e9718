"""Copies of files that may be large and mostly holes: blocks shared where the file system can, data alone elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from asyncvmm.storage.ranges import clone_file

_PIECE: Final = 8 << 20
"""Bytes between two looks at whether anybody still wants the copy: a few milliseconds."""

_BUFFER: Final = 1 << 20


class Unwanted(Exception):
    """Whoever wanted the copy does not any more."""


def _nobody() -> None:
    pass


def copy_file(source: int, target: int, check: Callable[[], None] = _nobody) -> None:
    """Make ``target``, an empty file, what ``source`` is; ``check`` may raise to end it early. Raises OSError."""
    check()
    with suppress(OSError):  # another file system, or one that shares no blocks
        clone_file(source, target)
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in data_runs(source, 0, size):
        copy_range(source, target, start, end, check)


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, each from its start to the byte behind it. Raises OSError."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        if start >= end:
            return
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, stop
        start = stop


def copy_range(source: int, target: int, start: int, end: int, check: Callable[[], None] = _nobody) -> None:
    """Copy from ``start`` to ``end``, each byte to its own offset. Raises OSError."""
    while start < end:
        check()
        size = min(_PIECE, end - start)
        try:
            done = os.copy_file_range(source, target, size, start, start)
        except OSError:  # not between these two file systems; or no room, which the other way says as well
            done = 0
        start += done or _copy_by_hand(source, target, start, min(size, _BUFFER))


def _copy_by_hand(source: int, target: int, place: int, size: int) -> int:
    data = os.pread(source, size, place)
    if not data:
        raise OSError(5, "the file became shorter")
    return os.pwrite(target, data, place)
