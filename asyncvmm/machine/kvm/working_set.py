"""The pages that a restored guest needs first: found by pagemap after one restore, made present ahead at later ones.

madvise(2), MADV_POPULATE_READ and _WRITE (Linux 5.14): page tables are filled for a whole run at one go, which costs a
fraction of as many faults. What is to be written is copied then, too.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Sequence
from typing import Final

from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.pagemap import pages_of
from asyncvmm.machine.kvm.pages import joined
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23

_GAP_BYTES: Final = 16 * PAGE_BYTES
"""Pages between two runs that are read that it is cheaper to take along than to ask twice. Of runs to be written none:
each page of them is copied."""

Advice = tuple[int, int, int]
"""One madvise(2): what is advised, and offset and size within guest memory."""

_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes, _madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int


def working_set(memory: GuestMemory) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """The runs that are present, and those among them that are this VM's own, hence were written to. Blocks."""
    present, own = pages_of(memory.host_address, memory.size)
    return tuple(joined(present.runs(), _GAP_BYTES)), tuple(own.runs())


def prefetch(memory: GuestMemory, touched: Sequence[Run], written: Sequence[Run]) -> None:
    """Make runs present, and those ``written`` this VM's own. Blocks; what cannot be is left to the guest's faults."""
    for advice, offset, size in advices(memory.size, touched, written):
        _madvise(memory.host_address + offset, size, advice)


def can_be_read(memory: GuestMemory, runs: Sequence[Run]) -> bool:
    """Make runs present that are about to be read. False where a file they are mapped from was cut off meanwhile: to
    read what is gone ends a process (SIGBUS). Blocks. Not found out before Linux 5.14."""
    for offset, size in joined(runs, _GAP_BYTES):
        if _madvise(memory.host_address + offset, size, _MADV_POPULATE_READ) and ctypes.get_errno() == errno.EFAULT:
            return False
    return True


def advices(memory_bytes: int, touched: Sequence[Run], written: Sequence[Run]) -> Iterator[Advice]:
    """What ``prefetch`` asks for, of the runs that are within memory."""
    for advice, runs in ((_MADV_POPULATE_WRITE, written), (_MADV_POPULATE_READ, touched)):
        for offset, size in runs:
            if offset >= 0 and offset + size <= memory_bytes:
                yield advice, offset, size
