"""Metrics are told at their times and at the end; the balloon is asked until the guest is about to end."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable

import anyio
import pytest

from asyncvmm.balloon import Balloon
from asyncvmm.devices.virtio.balloon.stats import BalloonStats
from asyncvmm.errors import StateError
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, Metrics
from asyncvmm.metrics.control import VmMetricsControl
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.upkeep import Upkeep

pytestmark = pytest.mark.anyio

INTERVAL_S = 0.005


class Guest:
    """A guest's balloon that counts how often it is asked, and answers by ``answer``."""

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self.answer = answer

    async def set_target_pages(self, pages: int) -> None:
        raise NotImplementedError

    async def actual_pages(self) -> int:
        return 0

    async def stats(self) -> BalloonStats:
        self.asked += 1
        self.answer()
        return BalloonStats(target_pages=0, actual_pages=self.asked)

    async def hint_free_pages(self) -> int:
        return 0


@pytest.fixture
def events() -> EventHub:
    return EventHub()


@pytest.fixture
def told(events: EventHub) -> list[Metrics]:
    """The metrics events that came."""
    found: list[Metrics] = []

    def note(event: Event) -> None:
        if isinstance(event, Metrics):
            found.append(event)

    events.attach(note)
    return found


def upkeep(events: EventHub, interval_s: float = INTERVAL_S) -> Upkeep:
    return Upkeep(VmMetricsControl(VmMetrics(), events, lambda: 0), interval_s)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 (nobody tells)
            await anyio.sleep(0.001)


async def test_metrics_are_told_again_and_again_and_once_more_at_the_end(events: EventHub, told: list[Metrics]) -> None:
    keep = upkeep(events)
    keep.start()
    keep.start()
    await until(lambda: len(told) >= 3)
    before = len(told)
    keep.stop()
    assert len(told) == before + 1
    keep.stop()
    await anyio.sleep(3 * INTERVAL_S)
    assert len(told) == before + 1


async def test_metrics_are_told_at_the_end_of_a_short_life(events: EventHub, told: list[Metrics]) -> None:
    keep = upkeep(events, 60)
    keep.start()
    await keep.rest()
    assert not told
    keep.stop()
    assert len(told) == 1


async def test_the_balloon_is_asked_until_the_guest_is_about_to_end(events: EventHub) -> None:
    guest, keep = Guest(), upkeep(events)
    balloon = Balloon(lambda: guest, 256)
    keep.poll(balloon, INTERVAL_S)
    await until(lambda: guest.asked >= 3)
    assert balloon.latest is not None
    await keep.rest()
    asked = guest.asked
    await anyio.sleep(3 * INTERVAL_S)
    assert guest.asked == asked
    await keep.rest()


async def test_a_guest_that_cannot_answer_is_asked_again(events: EventHub) -> None:
    def refuse() -> None:
        raise StateError("balloon", expected="a driver", found="none")

    guest, keep = Guest(refuse), upkeep(events)
    keep.poll(Balloon(lambda: guest, 256), INTERVAL_S)
    await until(lambda: guest.asked >= 2)
    guest.answer = lambda: None
    await until(lambda: guest.asked >= 4)
    await keep.rest()


async def test_an_error_of_ours_is_told_and_ends_nothing_else(
    events: EventHub, told: list[Metrics], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    guest, keep = Guest(fail), upkeep(events)
    keep.start()
    keep.poll(Balloon(lambda: guest, 256), INTERVAL_S)
    await until(lambda: bool(guest.asked) and len(told) > 1)
    with caplog.at_level(logging.ERROR):
        await keep.rest()
    assert "ZeroDivisionError" in caplog.text
    keep.stop()
    gc.collect()
    assert not complaints
