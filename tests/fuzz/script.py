"""The fuzzer's bytes, read as a script: numbers, choices and data, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Script:
    """Never runs dry: behind its end there are zeros, and ``ended`` is True."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return self._at >= len(self._data)

    def number(self, size: int) -> int:
        """A little-endian number of ``size`` bytes."""
        return int.from_bytes(self._take(size), "little")

    def byte(self) -> int:
        """A number of one byte."""
        return self.number(1)

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.byte() & 1)

    def pick(self, choices: Sequence[T]) -> T:
        """One of these."""
        return choices[self.byte() % len(choices)]

    def data(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        return self._take(size).ljust(size, b"\0")

    def size(self) -> int:
        """A size that something may have: mostly small, now and then enormous."""
        kind = self.byte()
        if kind < 0xE0:
            return kind
        return self.number(2) if kind < 0xFE else self.number(4)

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken
