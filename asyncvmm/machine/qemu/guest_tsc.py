"""The TSC of a guest on QEMU/TCG, on the host's clock: the host's, counted from when the vCPUs were let run.

Facts: QEMU's softmmu/cpu-timers.c (cpu_get_ticks: the host's counter, stopped with the vCPUs) and softmmu/cpus.c
(vm_prepare_start: the event RESUME, then cpu_enable_ticks; the reply to ``cont`` comes after both). The counter starts
at 0, for QEMU is started with its vCPUs stopped.
"""

from __future__ import annotations

import time

from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.timing.tsc import TscOffset, host_instant, offset_from_zero


class GuestTsc:
    """Made before QEMU is started; told when it lets the vCPUs run, and when it stops them."""

    def __init__(self) -> None:
        self._first = clock_sample()
        self._ahead_ns = _realtime_ahead_ns()
        self._earliest_ns = 0
        self._offset: TscOffset | None = None

    def resumed(self, realtime_ns: int | None) -> None:
        """RESUME, of QEMU's CLOCK_REALTIME ``realtime_ns``, has been heard. A step of that clock does no harm."""
        if realtime_ns is not None:
            self._earliest_ns = realtime_ns - max(self._ahead_ns, _realtime_ahead_ns())

    def running(self) -> None:
        """The reply to ``cont`` has been heard."""
        last = clock_sample()
        if self._first is not None and last is not None:
            self._offset = offset_from_zero(self._first, self._earliest_ns, last)

    def stopped(self) -> None:
        """The vCPUs are stopped: the counter stands still, and what it was before cannot be told from what it is."""
        self._first = self._offset = None

    def instant(self, tsc: int) -> tuple[int, int] | None:
        """CLOCK_MONOTONIC ns when the guest's TSC was ``tsc``, and the error in ns; None if that was never."""
        now = clock_sample()
        if self._first is None or self._offset is None or now is None:
            return None
        return host_instant(tsc, self._offset, self._first, now)


def _realtime_ahead_ns() -> int:
    """CLOCK_REALTIME less CLOCK_MONOTONIC, a little too much rather than too little."""
    monotonic_ns = time.monotonic_ns()
    return time.time_ns() - monotonic_ns
