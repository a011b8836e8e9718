from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.errors import ConfigError
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, Metrics
from asyncvmm.metrics.control import VmMetricsControl
from asyncvmm.metrics.flusher import MetricsFlusher
from asyncvmm.metrics.vm_metrics import VmMetrics

WALL_NS = 1_763_692_533_123_456_789


class Vm:
    """What a VM has of metrics, and the metrics that somebody heard of."""

    def __init__(self) -> None:
        self.groups = VmMetrics()
        self.events = EventHub()
        self.control = VmMetricsControl(self.groups, self.events, now=lambda: 7, wall_ns=lambda: WALL_NS)
        self.heard: list[Metrics] = []
        self.reached = anyio.Event()
        self.wanted = 0

    def listen(self) -> Callable[[], None]:
        return self.events.attach(self._hear)

    async def hears(self, count: int) -> None:
        """Until so many have come."""
        self.wanted, self.reached = count, anyio.Event()
        if len(self.heard) < count:
            await self.reached.wait()

    def counts(self) -> list[Any]:
        return [event.groups["balloon"]["inflate_count"] for event in self.heard]

    def _hear(self, event: Event) -> None:
        assert isinstance(event, Metrics)
        self.heard.append(event)
        if len(self.heard) >= self.wanted:
            self.reached.set()


@pytest.fixture
def vm() -> Vm:
    return Vm()


def test_a_flush_is_published_and_returned(vm: Vm) -> None:
    vm.listen()
    vm.groups.balloon.inflate_count += 3
    event = vm.control.flush()
    assert vm.heard == [event]
    assert (event.t_ns, event.utc_timestamp_ms) == (7, 1_763_692_533_123)
    assert vm.counts() == [3]


def test_a_flush_that_is_asked_for_comes_though_nobody_listens(vm: Vm) -> None:
    vm.groups.balloon.inflate_count += 3
    assert vm.control.flush().groups["balloon"]["inflate_count"] == 3
    assert vm.control.flush().groups["balloon"]["inflate_count"] == 0


@pytest.mark.anyio
async def test_metrics_are_flushed_again_and_again(vm: Vm) -> None:
    vm.listen()
    flusher = MetricsFlusher(vm.control, interval_s=0.01)
    flusher.start()
    vm.groups.balloon.inflate_count += 1
    await vm.hears(1)
    vm.groups.balloon.inflate_count += 5
    await vm.hears(3)
    flusher.stop()
    assert sum(vm.counts()) == 6


@pytest.mark.anyio
async def test_the_end_flushes_once_and_nothing_comes_after_it(vm: Vm) -> None:
    vm.listen()
    flusher = MetricsFlusher(vm.control, interval_s=0.01)
    flusher.start()
    flusher.start()
    vm.groups.balloon.inflate_count += 1
    flusher.stop()
    flusher.stop()
    flusher.start()
    await anyio.sleep(0.05)
    assert vm.counts() == [1]


@pytest.mark.anyio
async def test_what_nobody_hears_waits_for_somebody_who_does(vm: Vm) -> None:
    flusher = MetricsFlusher(vm.control, interval_s=0.005)
    flusher.start()
    vm.groups.balloon.inflate_count += 4
    await anyio.sleep(0.03)
    detach = vm.listen()
    await vm.hears(1)
    flusher.stop()
    detach()
    assert vm.counts()[0] == 4


def test_the_end_is_told_without_a_beginning_and_without_a_loop(vm: Vm) -> None:
    vm.listen()
    vm.groups.balloon.inflate_count += 2
    MetricsFlusher(vm.control).stop()
    assert vm.counts() == [2]


@pytest.mark.anyio
async def test_a_loop_that_was_away_makes_up_for_nothing(vm: Vm) -> None:
    vm.listen()
    flusher = MetricsFlusher(vm.control, interval_s=0.002)
    flusher.start()
    await vm.hears(1)
    before = len(vm.heard)
    _stand_still(0.02)
    for _ in range(2):
        await checkpoint()
    flusher.stop()
    assert len(vm.heard) - before <= 5


def _stand_still(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), float("inf")])
def test_an_interval_is_positive(vm: Vm, interval_s: float) -> None:
    with pytest.raises(ConfigError):
        MetricsFlusher(vm.control, interval_s)
