"""A C floor as a co-process: it is told to take one sample, and says how many nanoseconds that took."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _bench.bench import Skipped


class Floor:
    """A running floor program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def sample(self) -> float:
        """Nanoseconds of one sample. Raises Skipped with what the floor said instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline().strip()
        if not line.isdigit():
            raise Skipped(f"the C floor failed: {line or 'it ended'}")
        return float(line)


@contextmanager
def running_floor(program: Path, *arguments: str) -> Iterator[Floor]:
    """Start the floor; it ends when its input does."""
    words = [str(program), *arguments]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Floor(process)
        finally:
            process.kill()
