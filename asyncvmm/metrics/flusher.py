"""MetricsFlusher: flushes a VM's metrics at regular times, and once more at its end."""

from __future__ import annotations

import asyncio
from typing import Final

from asyncvmm.errors import ConfigError
from asyncvmm.metrics.control import VmMetricsControl

INTERVAL_S: Final = 60.0

_MOST_S: Final = 86400.0


class MetricsFlusher:
    """Flushes every ``interval_s`` seconds from ``start`` on, by a timer of the running loop, and in ``stop``.

    Nothing is flushed while nobody listens to the VM's events. Raises ConfigError for an interval that is not positive,
    or longer than a day.
    """

    def __init__(self, metrics: VmMetricsControl, interval_s: float = INTERVAL_S) -> None:
        if not 0 < interval_s <= _MOST_S:
            raise ConfigError("interval of metrics", expected=f"above 0 to {_MOST_S:g} s", found=interval_s)
        self._metrics = metrics
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin; on the VM's loop. May be called again: a VM may need several attempts to boot."""
        if self._timer is None and not self._stopped:
            loop = asyncio.get_running_loop()
            self._arm(loop, loop.time() + self._interval_s)

    def stop(self) -> None:
        """Flush a last time, and no more. May be called again, and without ``start``: what was counted is told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._stopped:
            self._stopped = True
            self._metrics.flush_if_heard()

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._timer = loop.call_at(when, self._flush, loop, when)

    def _flush(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        # On the beat of the first one, but a loop that was away for long does not make up for what it missed.
        self._arm(loop, max(due, loop.time() - self._interval_s) + self._interval_s)
        self._metrics.flush_if_heard()
