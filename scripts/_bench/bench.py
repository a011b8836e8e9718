"""What every figure is handed: where to build, how many rounds, whom to tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import attrs

from _bench.figure import Figure


class Skipped(Exception):
    """This host cannot measure this figure; the text says why."""


@attrs.frozen
class Bench:
    """One run of the bench."""

    root: Path
    quick: bool

    @property
    def cache(self) -> Path:
        """Where floors and guests are built."""
        return self.root / ".cache" / "bench"

    def rounds(self, full: int, quick: int) -> int:
        """How many rounds this run takes."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Progress, for a person."""
        print(f"bench: {text}", file=sys.stderr, flush=True)


Measure = Callable[[Bench], Coroutine[Any, Any, list[Figure]]]
