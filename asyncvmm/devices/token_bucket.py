"""A token bucket: so much per second on average, so much at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_NS: Final = 1_000_000_000


class TokenBucket:
    """Full at first. It counts in whole billionths of a token, so that nothing is lost however often it is asked."""

    __slots__ = ("_clock_ns", "_held", "_seen_ns", "burst", "rate")

    def __init__(self, rate: int, burst: int, clock_ns: Callable[[], int]) -> None:
        """``rate``: tokens per second, at least 1. ``burst``: the most it holds, at least 1. ``clock_ns``: a clock in
        nanoseconds that never goes back."""
        self.rate = rate
        self.burst = burst
        self._clock_ns = clock_ns
        self._held = burst * _NS
        self._seen_ns = clock_ns()

    def take(self, tokens: int) -> int:
        """Take so many, at most ``burst``, and return 0; or take none, and return the ns until there are as many."""
        wanted = tokens * _NS
        self._refill()
        if wanted <= self._held:
            self._held -= wanted
            return 0
        return -((self._held - wanted) // self.rate)

    @property
    def tokens(self) -> int:
        """Whole tokens there are."""
        self._refill()
        return self._held // _NS

    def set_tokens(self, tokens: int) -> None:
        """Hold so many now, at most ``burst``."""
        self._refill()
        self._held = min(tokens, self.burst) * _NS

    def _refill(self) -> None:
        now = self._clock_ns()
        self._held = min(self.burst * _NS, self._held + (now - self._seen_ns) * self.rate)
        self._seen_ns = now
