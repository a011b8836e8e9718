"""What a VM is made of, counted as the process shows it: threads, descriptors, mappings, children, temporary files."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import threading
from collections import Counter
from pathlib import Path

import attrs

from asyncvmm.machine.kvm.runner import IDLE_NAME
from asyncvmm.machine.qemu.spawning import THREAD_NAME

_OF_A_VM = re.compile(r"kvm|memfd|/dev/zero \(deleted\)|asyncvmm")
_IDLE = ("AnyIO worker thread", IDLE_NAME, THREAD_NAME)


@attrs.frozen
class Holdings:
    """Everything a VM could leave behind. ``mappings`` are those whose size is ``ram`` bytes, or that name KVM."""

    threads: tuple[str, ...]
    tasks: int
    descriptors: tuple[tuple[str, int], ...]
    mappings: tuple[str, ...]
    children: frozenset[int]
    files: tuple[str, ...]

    @classmethod
    def now(cls, ram: int = 0) -> Holdings:
        """Count. anyio keeps idle worker threads for the next call, we idle runners and a
        thread that starts children: they are nobody's."""
        return cls(
            tuple(sorted(thread.name for thread in threading.enumerate() if thread.name not in _IDLE)),
            len(asyncio.all_tasks()),
            _descriptors(),
            _mappings(ram),
            frozenset(children(os.getpid())),
            tuple(sorted(os.listdir(tempfile.gettempdir()))),
        )


def _descriptors() -> tuple[tuple[str, int], ...]:
    """Kinds of descriptor and how many there are of each: numbers, inodes and files that a test holds do not matter."""
    kinds: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            kinds[re.sub(r"\[\d+\]|\d+$", "", os.readlink(f"/proc/self/fd/{entry}"))] += 1
        except FileNotFoundError:
            continue
    return tuple(sorted(kinds.items()))


def _mappings(ram: int) -> tuple[str, ...]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        if (_OF_A_VM.search(name) and ".so" not in name) or end - start == ram:
            found.append(f"{end - start:#x} {name}")
    return tuple(sorted(found))


def children(pid: int) -> set[int]:
    """The children of a process, of whichever thread; a thread may end while it is asked."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found |= {int(child) for child in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def descendants(pid: int) -> set[int]:
    """The children of another process, and theirs."""
    own = children(pid)
    return own.union(*(descendants(child) for child in own))


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended (a zombie has)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
