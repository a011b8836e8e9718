"""MemoryWriter: guest memory into a snapshot's memory file. Pages that are zeros become holes.

To find those, the first eight bytes of each page are looked at; only pages in which these are zero are read whole.

Large runs are on their way to the disk as soon as they are written (sync_file_range(2)), beside the copying of what
follows: the fsync in the end has little left to wait for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ParamSpec, TypeVar

from asyncvmm.errors import SnapshotFailed
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap, Run, runs_of

P = ParamSpec("P")
T = TypeVar("T")

PIECE_BYTES = 1 << 20
"""Looked at and written at a time."""

_ABSENT, _DATA, _ZERO = 0, 1, 2
_KINDS_IN_A_DIFFERENCE = bytes([_ZERO, _DATA]) + bytes(range(2, 256))

_first_word = struct.Struct("Q").unpack_from

_BLOCK_PAGES = 16
_ZERO_PAGE = bytes(PAGE_BYTES)
_ZERO_BLOCK = bytes(PAGE_BYTES * _BLOCK_PAGES)

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

# linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2

_LARGE_BYTES = 1 << 18
"""From here on a run is worth a call of its own: the blocks of a small one take as long to allocate."""

_PATIENCE_NS = 1_000_000
_BYTES_PER_NS = 16
"""So much longer may all these calls make the copying, as no vCPU may run meanwhile: a sixteenth of a nanosecond for
each byte written (copying one takes half a nanosecond), and the patience. They block where a disk's queue is full.
"""


class MemoryWriter:
    """Writes the pages of ``size`` bytes of guest memory to ``fd``, an empty file, where they lie in memory.

    Calls block: they are for a worker thread. Each raises SnapshotFailed if the file cannot take what is written.
    """

    def __init__(self, fd: int, size: int, *, is_difference: bool = False) -> None:
        if size <= 0 or size % PAGE_BYTES:
            raise SnapshotFailed("memory file", expected=f"whole pages of {PAGE_BYTES} bytes", found=size)
        self._fd = fd
        self._size = size
        self._is_difference = is_difference
        self._pages = bytearray(size // PAGE_BYTES)
        self._sending_ns = 0
        self.bytes_written = 0
        """Pages written again count again."""
        _tried(os.ftruncate, fd, size)

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return self._size

    @property
    def is_difference(self) -> bool:
        """Whether what is not written stays the base's."""
        return self._is_difference

    def write(self, offset: int, view: Any) -> None:
        """Write whole pages (bytes, or any contiguous buffer); the last ones written for a place count.

        Raises ValueError for others.
        """
        if type(view) is memoryview and view.format == "B" and view.ndim == 1:
            self._write(offset, view)
            return
        with memoryview(view) as given, given.cast("B") as data:
            self._write(offset, data)

    def write_runs(self, memory: memoryview, runs: Iterable[Run]) -> None:
        """Write these runs of ``memory``, all of it as bytes. Of many single pages each costs less than by ``write``.

        Raises ValueError for what are no whole pages, and for a ``memory`` of another size.
        """
        if len(memory) != self._size:
            raise ValueError(f"{len(memory)} bytes, where memory has {self._size}")
        with memory.cast("Q") as words:
            for offset, size in runs:
                if size == PAGE_BYTES and not offset % PAGE_BYTES and 0 <= offset < self._size and words[offset // 8]:
                    with memory[offset : offset + PAGE_BYTES] as page:
                        self._write_run(offset, page)
                    self._pages[offset // PAGE_BYTES] = _DATA
                else:
                    with memory[offset : offset + size] as run:
                        self._write(offset, run)

    def zero(self, offset: int, size: int) -> None:
        """Those pages are zeros."""
        self._check(offset, size)
        self._set(offset, bytes(size // PAGE_BYTES))

    def map(self) -> MemoryMap:
        """What the file holds now."""
        data, zero = runs_of(self._pages, _DATA), runs_of(self._pages, _ZERO)
        return MemoryMap(size=self._size, data=data, zero=zero, is_difference=self._is_difference)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or offset % PAGE_BYTES or size % PAGE_BYTES or offset + size > self._size:
            raise ValueError(f"no whole pages of {self._size} bytes: {size} bytes at {offset}")

    def _write(self, offset: int, data: memoryview) -> None:
        size = len(data)
        self._check(offset, size)
        if size == PAGE_BYTES and _first_word(data)[0]:  # a busy guest's memory is full of pages on their own
            self._write_run(offset, data)
            self._pages[offset // PAGE_BYTES] = _DATA
            return
        for start in range(0, size, PIECE_BYTES):
            with data[start : start + PIECE_BYTES] as piece:
                self._write_piece(offset + start, piece)

    def _write_piece(self, offset: int, piece: memoryview) -> None:
        kinds = nonzero_pages(piece)
        for start, size in runs_of(kinds, _DATA):
            with piece[start : start + size] as run:
                self._write_run(offset + start, run)
        self._set(offset, kinds)

    def _write_run(self, offset: int, run: memoryview) -> None:
        done = _tried(os.pwrite, self._fd, run, offset)
        while done < len(run):
            with run[done:] as rest:
                done += _tried(os.pwrite, self._fd, rest, offset + done)
        self.bytes_written += len(run)
        if done >= _LARGE_BYTES:
            self._send(offset, done)

    def _send(self, offset: int, size: int) -> None:
        if self._sending_ns <= _PATIENCE_NS + self.bytes_written // _BYTES_PER_NS:
            begin = time.monotonic_ns()
            begin_write_back(self._fd, offset, size)
            self._sending_ns += time.monotonic_ns() - begin

    def _set(self, offset: int, kinds: bytes | bytearray) -> None:
        """Pages from ``offset`` on are data (1), already written, or zeros (0)."""
        first = offset // PAGE_BYTES
        before = self._pages[first : first + len(kinds)]
        after = kinds.translate(_KINDS_IN_A_DIFFERENCE) if self._is_difference else kinds
        if _DATA in before:
            gone = bytes(was == _DATA != now for was, now in zip(before, kinds, strict=True))
            for start, size in runs_of(gone, True):
                self._punch(offset + start, size)
        self._pages[first : first + len(kinds)] = after

    def _punch(self, offset: int, size: int) -> None:
        """Where the file system has no holes, zeros are written: they read the same."""
        if not _tried(punch_hole, self._fd, offset, size):
            for at in range(offset, offset + size, PAGE_BYTES):
                _tried(os.pwrite, self._fd, _ZERO_PAGE, at)


def nonzero_pages(piece: memoryview) -> bytearray:
    """For each page of ``piece``, whole pages as bytes, whether there is anything but zeros in it (0 or 1)."""
    with piece.cast("Q") as words, words[:: PAGE_BYTES // 8] as firsts:
        kinds = bytearray(map(bool, firsts))
    if 0 not in kinds:
        return kinds
    for candidates in re.finditer(rb"\0+", bytes(kinds)):
        _look_closer(piece, kinds, *candidates.span())
    return kinds


def _look_closer(piece: memoryview, kinds: bytearray, start: int, end: int) -> None:
    for block in range(start, end, _BLOCK_PAGES):
        last = min(block + _BLOCK_PAGES, end)
        if last - block == _BLOCK_PAGES and _bytes_of(piece, block, last) == _ZERO_BLOCK:
            continue
        for page in range(block, last):
            kinds[page] = _bytes_of(piece, page, page + 1) != _ZERO_PAGE


def _bytes_of(piece: memoryview, first: int, end: int) -> bytes:
    """Comparing memoryviews looks at one byte at a time; comparing bytes does not."""
    with piece[first * PAGE_BYTES : end * PAGE_BYTES] as pages:
        return pages.tobytes()


def punch_hole(fd: int, offset: int, size: int) -> bool:
    """Make a hole; False where the file system has none. Raises OSError."""
    if _fallocate()(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def begin_write_back(fd: int, offset: int, size: int) -> None:
    """Have these bytes written to disk soon. Does nothing where the C library or the file system has no such call.

    An error is no reason to fail: this makes nothing durable, and the fsync that does reports the same one.
    """
    if call := _sync_file_range():
        call(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    call: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes, call.restype = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint), ctypes.c_int
    return call  # type: ignore[no-any-return]


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    libc = ctypes.CDLL(None, use_errno=True)
    call: Any = getattr(libc, "fallocate64", None) or libc.fallocate
    call.argtypes, call.restype = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64), ctypes.c_int
    return call  # type: ignore[no-any-return]


def _tried(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    try:
        return call(*arguments, **options)
    except OSError as error:
        raise SnapshotFailed("memory file", expected="room for it", found=error.strerror) from None
