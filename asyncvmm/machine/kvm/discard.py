"""Guest pages given back to the host. Afterwards they cost nothing, and read as zeros.

How depends on what is mapped there:

- anonymous private memory: MADV_DONTNEED.
- a snapshot's file, mapped private: MADV_DONTNEED would show the file's content again, so a fresh anonymous mapping
  is put in its place. Each place apart from others costs two mappings of the process (vm.max_map_count, 65530 by
  default), so there is an end to that; the pages beyond it stay as they are.
- shared memory (a memfd): MADV_REMOVE, which punches a hole in the file, as FALLOC_FL_PUNCH_HOLE does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

from asyncvmm.errors import ConfigError
from asyncvmm.machine.kvm.memory import offset_of
from asyncvmm.x86.layout import Region

Backing = Literal["anonymous", "private-file", "shared"]

MOST_RUNS: Final = 8192
"""Places apart from each other that may be given back in one mapping of a file."""

_SHORT_BYTES: Final = 1 << 18
"""Up to here a call takes microseconds, and giving up the GIL could cost a whole switch interval."""

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
_MAP_FAILED: Final = (1 << 64) - 1

_ADVISE_TYPES = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_TYPES = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


class _Calls:
    """The two system calls, by one library handle."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.madvise = library.madvise
        self.madvise.argtypes, self.madvise.restype = _ADVISE_TYPES, ctypes.c_int
        self.mmap = library.mmap
        self.mmap.argtypes, self.mmap.restype = _MAP_TYPES, ctypes.c_size_t


_LONG = _Calls(ctypes.CDLL(None, use_errno=True))
_SHORT = _Calls(ctypes.PyDLL(None, use_errno=True))


def discard(host_address: int, size: int, backing: Backing) -> None:
    """Give back whole pages of this process; ``backing`` is what is mapped there.

    Raises OSError for what the kernel says: EINVAL for what is not aligned, ENOMEM for too many mappings.
    """
    calls = _SHORT if size <= _SHORT_BYTES else _LONG
    if backing == "anonymous":
        _advise(calls, host_address, size, mmap.MADV_DONTNEED)
    elif backing == "shared":
        _advise(calls, host_address, size, mmap.MADV_REMOVE)
    else:
        _map_afresh(calls, host_address, size)


def _map_afresh(calls: _Calls, host_address: int, size: int) -> None:
    """New anonymous memory there, at one go: other threads see either the old pages or zeros."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if calls.mmap(host_address, size, protection, _FLAGS, -1, 0) == _MAP_FAILED:
        raise _error()
    _advise(calls, host_address, size, mmap.MADV_DONTFORK)


def _advise(calls: _Calls, host_address: int, size: int, advice: int) -> None:
    if calls.madvise(host_address, size, advice):
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class GuestDiscard:
    """Gives pages of one guest back: the backend of its balloon (devices.virtio.balloon).

    regions, host_address: guest RAM as it is mapped, back to back. on_discard: is told of each range that now reads as
    zeros, as guest address and size; neither KVM's dirty log nor anybody else sees that. refused: bytes that the host
    could not take back.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        host_address: int,
        backing: Backing,
        *,
        on_discard: Callable[[int, int], None] | None = None,
        most_runs: int = MOST_RUNS,
    ) -> None:
        self.refused = 0
        self._regions = regions
        self._host_address = host_address
        self._backing = backing
        self._on_discard = on_discard
        self._anonymous = Runs()
        self._most_runs = most_runs

    def release(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Give back ranges of whole pages, each within one region of RAM; returns how many bytes were. Never raises."""
        freed = 0
        for address, size in ranges:
            try:
                self._discard(offset_of(self._regions, address, size), size)
            except (OSError, ConfigError):
                self.refused += size
                continue
            freed += size
            if self._on_discard is not None:
                self._on_discard(address, size)
        return freed

    def _discard(self, offset: int, size: int) -> None:
        """Raises OSError."""
        if self._backing != "private-file":
            discard(self._host_address + offset, size, self._backing)
        elif self._anonymous.covers(offset, offset + size):
            discard(self._host_address + offset, size, "anonymous")
        elif self._anonymous.count_with(offset, offset + size) > self._most_runs:
            raise OSError(0, "too many places given back")
        else:
            discard(self._host_address + offset, size, "private-file")
            self._anonymous.add(offset, offset + size)


class Runs:
    """A set of numbers as runs of them, each from a start to the one behind its end; runs that touch are one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def covers(self, start: int, end: int) -> bool:
        """Whether all of ``start`` to ``end`` is in it."""
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and end <= self._ends[place]

    def count_with(self, start: int, end: int) -> int:
        """How many runs there would be with this one."""
        first, last = self._touched(start, end)
        return len(self) - (last - first) + 1

    def add(self, start: int, end: int) -> None:
        """Take in ``start`` to ``end``."""
        first, last = self._touched(start, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        """The first run that touches, and the one behind the last."""
        return bisect_left(self._ends, start), bisect_right(self._starts, end)
