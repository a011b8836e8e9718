"""Which pages of this process are there, and which of them are its own, as /proc/self/pagemap says.

Source: Documentation/admin-guide/mm/pagemap.rst of Linux: 64 bits a page, of which bit 63 is set for a page that is
present, 62 for one that is swapped out, 61 for a page of a file (or of shared memory). What a private mapping of a file
has copied on write is not the file's any more. Frame numbers are hidden from who is not privileged, these bits are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.snapshot.memory_map import PAGE_BYTES

PAGEMAP: Final = Path("/proc/self/pagemap")

_ENTRY: Final = 8
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20  # of an entry's last byte
_CHUNK_PAGES: Final = 1 << 16


def _table(holds: Callable[[int], bool]) -> bytes:
    return bytes(map(holds, range(256)))


_THERE: Final = _table(lambda flags: bool(flags & _PRESENT))
_OWN: Final = _table(lambda flags: bool(flags & (_PRESENT | _SWAPPED)) and not flags & _OF_FILE)


def pages_of(host_address: int, size: int) -> tuple[PageSet, PageSet]:
    """The pages there that are present, and those that are this process's own, swapped out or not. Blocks.

    Where the kernel does not say, every page is both.
    """
    present, own = PageSet(size), PageSet(size)
    try:
        fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        fd = -1
    try:
        _read(fd, host_address, size, present, own)
    except OSError:
        present.add(0, size)
        own.add(0, size)
    finally:
        if fd >= 0:
            os.close(fd)
    return present, own


def _read(fd: int, host_address: int, size: int, present: PageSet, own: PageSet) -> None:
    """Raises OSError."""
    page, end = host_address // PAGE_BYTES, (host_address + size) // PAGE_BYTES
    offset = 0
    while page < end:
        entries = os.pread(fd, _ENTRY * min(_CHUNK_PAGES, end - page), _ENTRY * page)
        flags = entries[_ENTRY - 1 :: _ENTRY]
        if not flags:
            raise OSError(0, "the end of pagemap")
        present.add_marks(flags.translate(_THERE), offset)
        own.add_marks(flags.translate(_OWN), offset)
        page += len(flags)
        offset += PAGE_BYTES * len(flags)
