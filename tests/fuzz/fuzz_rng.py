"""The entropy device under attack."""

from __future__ import annotations

from collections.abc import Callable

from asyncvmm.device_config import RngConfig
from asyncvmm.devices.virtio.rng import VirtioRng
from asyncvmm.metrics.groups import EntropyMetrics
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

_LIMITS = (RngConfig(bytes_per_s=0), RngConfig(bytes_per_s=1000, burst_bytes=100), RngConfig(bytes_per_s=1 << 20))


class RngTarget(Target):
    """An entropy device whose source fails now and then, and whose clock stands still until told otherwise."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.timers: list[Callable[[], None]] = []
        self.fails = False
        self.shortens = False
        self.limits: RngConfig | None = None

    def make(self, script: Script) -> VirtioRng:
        """See Target."""
        self.timers.clear()
        self.limits = self.limits or script.pick(_LIMITS)
        self.device = VirtioRng(
            self.limits, self._random, EntropyMetrics(), clock_ns=lambda: self.now_ns, later=self._later
        )
        return self.device

    def _random(self, size: int) -> bytes:
        assert 0 < size <= 1 << 16
        if self.fails:
            raise OSError("no entropy")
        return b"\xaa" * (1 if self.shortens else size)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        assert 0 <= seconds < 3600
        self.timers.append(call)

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        return [], [script.size() % 2048 for _ in range(1 + script.byte() % 3)]

    def event(self, script: Script) -> None:
        """Time goes by, or the source changes its mood."""
        kind = script.byte() % 4
        if kind == 0:
            self.fails, self.shortens = script.flag(), script.flag()
        else:
            self.now_ns += script.number(4) << (kind * 2)
            self._fire()

    def _fire(self) -> None:
        due, self.timers = self.timers, []
        for call in due:
            call()

    def settle(self) -> None:
        """See Target."""
        self._fire()

    def check(self) -> None:
        """See Target."""
        assert len(self.timers) <= 1, "timers pile up"

    def may_wait(self, index: int) -> bool:
        """See Target."""
        return bool(self.timers)

    def serves(self, driver: Driver) -> None:
        """See Target."""
        self.fails = self.shortens = False
        self.now_ns += 1 << 40
        self._fire()
        assert driver.request(0, writable=[16]) == b"\xaa" * 16


def run(data: bytes) -> None:
    """One script."""
    play(RngTarget(), data)
