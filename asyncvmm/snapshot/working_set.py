"""WorkingSet: the pages that a restored guest needs before it is heard of first. Found at one restore, used later.

It stands beside the snapshot's own files and is no part of it: one that is not there, or not to be understood, is one
that is not known.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from tempfile import NamedTemporaryFile

import attrs

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.snapshot.memory_map import Run, runs_from_plain, runs_to_plain

FILE = "working-set.json"

_MOST_BYTES = 16 << 20


@attrs.frozen
class WorkingSet:
    """Runs that are read, and runs that are written, before the guest's first event. Empty: not known."""

    touched: tuple[Run, ...] = ()
    written: tuple[Run, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.touched or self.written)


def read_working_set(directory: Path, memory_bytes: int) -> WorkingSet:
    """The one that was kept there. Blocks; raises nothing."""
    try:
        fd = os.open(directory / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not S_ISREG(os.fstat(fd).st_mode):
                return WorkingSet()
            plain = decode(file.read(_MOST_BYTES))
            return WorkingSet(
                runs_from_plain(plain["touched"], memory_bytes), runs_from_plain(plain["written"], memory_bytes)
            )
    except (OSError, SnapshotDamaged, KeyError, TypeError):
        return WorkingSet()


def keep_working_set(directory: Path, found: WorkingSet) -> None:
    """Keep it there, unless there is one. Blocks; raises nothing: who cannot write there goes without it."""
    data = encode({"touched": runs_to_plain(found.touched), "written": runs_to_plain(found.written)})
    with suppress(OSError), NamedTemporaryFile(dir=directory, prefix=".working-set-") as file:
        file.write(data)
        file.flush()
        os.link(file.name, directory / FILE)
