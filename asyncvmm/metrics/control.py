"""VmMetricsControl: what a caller has as ``vm.metrics``."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Metrics
from asyncvmm.metrics.vm_metrics import VmMetrics


class VmMetricsControl:
    """Flushes one VM's metrics to its events.

    ``groups`` are what the devices count in. ``now`` gives nanoseconds since the VM's start, ``wall_ns`` those since
    1970 in UTC.
    """

    def __init__(
        self,
        groups: VmMetrics,
        events: EventHub,
        now: Callable[[], int],
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.groups = groups
        self._events = events
        self._now = now
        self._wall_ns = wall_ns

    def flush(self) -> Metrics:
        """Publish a ``metrics`` event, whoever listens, and return it. To be called on the VM's loop.

        Its counters say what came since the flush before, and so will those of the next.
        """
        event = self.groups.flush(self._now(), self._wall_ns() // 1_000_000)
        self._events.publish(event)
        return event

    def flush_if_heard(self) -> None:
        """Flush, unless nobody listens: then the counts wait for somebody who does."""
        if self._events.listening:
            self.flush()
