"""Page faults of this process's threads: what a restored guest's first steps cost. See getrusage(2), proc(5)."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

import attrs


@attrs.frozen
class Faults:
    """minor: a page was found or made in memory. major: it was read from a disk."""

    minor: int
    major: int

    def __add__(self, other: Faults) -> Faults:
        return Faults(self.minor + other.minor, self.major + other.major)

    def __sub__(self, other: Faults) -> Faults:
        return Faults(self.minor - other.minor, self.major - other.major)


NO_FAULTS: Final = Faults(0, 0)


def thread_faults() -> Faults:
    """Of this thread."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return Faults(usage.ru_minflt, usage.ru_majflt)


def faults_of(native_id: int) -> Faults:
    """Of another thread of this process; none of one that has ended."""
    try:
        stat = Path(f"/proc/self/task/{native_id}/stat").read_text()
    except OSError:
        return NO_FAULTS
    fields = stat.rpartition(")")[2].split()  # from field 3, state, on; minflt is field 10, majflt field 12
    return Faults(int(fields[7]), int(fields[9]))
