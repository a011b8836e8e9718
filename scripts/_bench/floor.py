"""A C floor, told to take one sample, says how many nanoseconds that took: as a co-process, or loaded into this one."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _bench.bench import Skipped


class Floor:
    """A running floor program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def sample(self, word: str = "go") -> float:
        """Nanoseconds of one sample of the kind ``word``. Raises Skipped with what the floor said instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline().strip()
        if not line.isdigit():
            raise Skipped(f"the C floor failed: {line or 'it ended'}")
        return float(line)


class LoadedFloor:
    """A floor in this process: the same C calls, in an address space as large as ours."""

    def __init__(self, library: Path, recipe: Path, memory_mib: int) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("floor_sample", "floor_sample_handed"):
            if hasattr(self._library, name):
                getattr(self._library, name).restype = ctypes.c_uint64
        if not self._library.floor_prepare(str(recipe).encode(), str(memory_mib).encode()):
            raise Skipped("the C floor cannot read its recipe")

    def sample(self, *, handed: bool = False) -> float:
        """Nanoseconds of one sample. ``handed``: taken by another thread, which is woken for it. Raises Skipped if it
        failed."""
        took = self._library.floor_sample_handed() if handed else self._library.floor_sample()
        if not took:
            raise Skipped("the C floor failed")
        return float(took)


@contextmanager
def running_floor(program: Path, *arguments: str) -> Iterator[Floor]:
    """Start the floor; it ends when its input does."""
    words = [str(program), *arguments]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Floor(process)
        finally:
            process.kill()
