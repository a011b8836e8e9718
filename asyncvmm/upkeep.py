"""Upkeep: what goes on beside a guest that runs, at regular times: metrics are told, the balloon is asked."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asyncvmm.metrics.control import VmMetricsControl
from asyncvmm.metrics.flusher import MetricsFlusher

if TYPE_CHECKING:
    from asyncvmm.balloon import Balloon

_log = logging.getLogger("asyncvmm.upkeep")


class Upkeep:
    """``metrics`` every ``interval_s`` seconds, and a last time at the end; the balloon's statistics as it is told."""

    def __init__(self, metrics: VmMetricsControl, interval_s: float) -> None:
        self._flusher = MetricsFlusher(metrics, interval_s)
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on. May be called again: a VM may need several attempts to boot."""
        self._flusher.start()

    def poll(self, balloon: Balloon, interval_s: float) -> None:
        """Ask for the guest's memory statistics every ``interval_s`` seconds, from now on. Once."""
        self._polling = asyncio.get_running_loop().create_task(balloon.poll(interval_s))

    async def rest(self) -> None:
        """Ask no more: the guest is about to end."""
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.wait([polling])
            if not polling.cancelled():
                _log.error("the balloon was not asked to the end", exc_info=polling.exception())

    def stop(self) -> None:
        """Tell the metrics a last time."""
        self._flusher.stop()
