"""Upkeep: what goes on beside a guest that runs, at regular times: metrics are told, the balloon is asked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asyncvmm.metrics.control import VmMetricsControl
from asyncvmm.metrics.flusher import MetricsFlusher

if TYPE_CHECKING:
    from asyncvmm.balloon import Balloon


class Upkeep:
    """``metrics`` every ``interval_s`` seconds, and a last time at the end; the balloon's statistics as it is told."""

    def __init__(self, metrics: VmMetricsControl, interval_s: float) -> None:
        self._flusher = MetricsFlusher(metrics, interval_s)
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From the boot on. May be called again."""
        self._flusher.start()

    def poll(self, balloon: Balloon, interval_s: float) -> None:
        """Ask for the guest's memory statistics, from now on."""
        self._polling = asyncio.get_running_loop().create_task(balloon.poll(interval_s))

    async def rest(self) -> None:
        """Ask no more: the guest is about to end."""
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.wait([polling])

    def stop(self) -> None:
        """Tell the metrics a last time."""
        self._flusher.stop()
