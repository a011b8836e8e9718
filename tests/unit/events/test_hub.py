from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import BootError, ConfigError, GuestStopped
from asyncvmm.events.hub import MOST_LISTENERS, EventHub, Subscription
from asyncvmm.events.types import (
    Event,
    GuestExit,
    GuestHeartbeat,
    GuestIdle,
    GuestListener,
    GuestPreExec,
    GuestReady,
    LogLost,
    VmState,
)

pytestmark = pytest.mark.anyio


def beats(first: int, last: int) -> list[Event]:
    return [GuestHeartbeat(n, n) for n in range(first, last + 1)]


async def read_all(subscription: Subscription) -> list[Event]:
    return [event async for event in subscription]


async def test_milestones_follow_the_events() -> None:
    hub = EventHub()
    events = [GuestReady(1), GuestPreExec(2), GuestListener(3, "tcp", 80), GuestListener(4, "tcp", 81), GuestExit(5, 3)]
    for event in events:
        hub.publish(event)
    assert (await hub.ready, await hub.pre_exec, await hub.listener, await hub.exit) == (*events[:3], 3)
    assert not hub.stopped.done


async def test_what_the_guest_has_come_to_is_remembered_each_thing_once() -> None:
    hub = EventHub()
    assert hub.heartbeat is None
    assert list(hub.past()) == []
    web, shell = GuestListener(3, "tcp", 80), GuestListener(4, "tcp6", 22)
    events = [GuestHeartbeat(1, 1), GuestPreExec(2), web, shell, GuestListener(5, "tcp", 80), GuestIdle(7)]
    for event in [*events, GuestHeartbeat(6, 2), GuestReady(8)]:
        hub.publish(event)
    assert hub.heartbeat == GuestHeartbeat(6, 2)
    assert list(hub.past()) == [GuestPreExec(2), web, shell, GuestHeartbeat(6, 2), GuestIdle(7)]
    assert await hub.idle == GuestIdle(7)


async def test_what_a_saved_guest_had_come_to_is_recalled_and_told_to_nobody() -> None:
    saved, restored, told = EventHub(), EventHub(), list[Event]()
    for event in (GuestPreExec(2), GuestListener(3, "tcp", 80), GuestHeartbeat(4, 9), GuestIdle(7)):
        saved.publish(event)
    restored.attach(told.append)
    for come_to in saved.past():
        restored.recall(come_to)
    assert list(restored.past()) == list(saved.past())
    assert await restored.listener == GuestListener(3, "tcp", 80)
    assert told == []


async def test_a_guest_with_endless_listeners_is_remembered_in_part() -> None:
    hub = EventHub()
    for port in range(1, 2 * MOST_LISTENERS):
        hub.publish(GuestListener(0, "tcp", port))
    assert len(list(hub.past())) == MOST_LISTENERS


async def test_a_clean_stop_ends_iterations_after_what_is_queued() -> None:
    hub = EventHub()
    subscription = hub.subscribe()
    for event in beats(1, 3):
        hub.publish(event)
    hub.close("shutdown")
    assert await read_all(subscription) == beats(1, 3)
    assert await read_all(subscription) == []
    assert await hub.stopped == "shutdown"
    with pytest.raises(GuestStopped, match="before ready"):
        await hub.ready


async def test_a_death_raises_after_what_is_queued_in_every_reader_and_milestone() -> None:
    hub = EventHub()
    first, second = hub.subscribe(), hub.subscribe()
    hub.publish(GuestReady(1))
    hub.fail(BootError("dead", reason="panic"))
    for subscription in (first, second):
        assert await anext(subscription) == GuestReady(1)
        with pytest.raises(BootError, match="dead"):
            await anext(subscription)
    assert await hub.ready == GuestReady(1)
    with pytest.raises(BootError, match="dead"):
        await hub.exit
    assert await hub.stopped == "panic"


async def test_readers_that_wait_are_woken_by_events_and_by_the_end() -> None:
    hub = EventHub()
    seen: list[Event] = []

    async def read() -> None:
        async for event in hub:
            seen.append(event)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        hub.publish(GuestReady(1))
        await anyio.wait_all_tasks_blocked()
        assert seen == [GuestReady(1)] * 2
        hub.close()
    assert not hub.listening


async def test_two_tasks_on_one_subscription_share_its_events() -> None:
    hub = EventHub()
    subscription, seen = hub.subscribe(), list[Event]()

    async def read() -> None:
        async for event in subscription:
            seen.append(event)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        for event in beats(1, 5):
            hub.publish(event)
        hub.close()
    assert seen == beats(1, 5)


async def test_iterating_after_the_end_ends_or_raises_at_once() -> None:
    stopped, dead = EventHub(), EventHub()
    stopped.close()
    dead.fail(BootError("dead", reason="panic"))
    assert [event async for event in stopped] == []
    with pytest.raises(BootError):
        await anext(aiter(dead))


async def test_the_first_end_counts() -> None:
    hub = EventHub()
    hub.fail(BootError("dead", reason="panic"))
    hub.close()
    hub.fail(BootError("other", reason="reset"))
    assert await hub.stopped == "panic"
    with pytest.raises(BootError, match="dead"):
        await anext(hub.subscribe())


async def test_what_does_not_fit_is_dropped_and_counted_in_its_place() -> None:
    hub = EventHub()
    subscription = hub.subscribe(capacity=2)
    for event in beats(1, 5):
        hub.publish(event)
    assert [await anext(subscription) for _ in range(2)] == beats(1, 2)
    for event in beats(6, 7):
        hub.publish(event)
    hub.close()
    assert await read_all(subscription) == [LogLost(5, 3), GuestHeartbeat(6, 6), LogLost(7, 1)]


@given(st.lists(st.sampled_from(["publish", "read"]), max_size=60), st.integers(1, 5))
def test_every_event_is_read_in_order_or_counted_as_lost(steps: list[str], capacity: int) -> None:
    async def follow() -> tuple[list[int], int]:
        hub, published, read = EventHub(), 0, list[Event]()
        subscription = hub.subscribe(capacity=capacity)
        for step in steps:
            if step == "publish":
                published += 1
                hub.publish(GuestHeartbeat(published, published))
            elif len(read) < published:
                with anyio.move_on_after(0):
                    read.append(await anext(subscription))
        hub.close()
        return positions(read + await read_all(subscription)), published

    seen, published = asyncio.run(follow())
    assert seen == list(range(1, published + 1))


def positions(events: list[Event]) -> list[int]:
    """The numbers of the heartbeats read, and of those that log.lost stands for."""
    numbers: list[int] = []
    for event in events:
        if isinstance(event, LogLost):
            numbers += range(len(numbers) + 1, len(numbers) + 1 + event.lines)
        elif isinstance(event, GuestHeartbeat):
            numbers.append(event.counter)
    return numbers


@pytest.mark.parametrize("types", [[GuestReady, VmState], ["guest.ready", "vm.state"]])
async def test_a_subscription_can_be_to_some_types(types: list[type[Event] | str]) -> None:
    hub = EventHub()
    subscription = hub.subscribe(types=types)
    for event in (VmState(0, "booting"), *beats(1, 3), GuestReady(4)):
        hub.publish(event)
    hub.close()
    assert await read_all(subscription) == [VmState(0, "booting"), GuestReady(4)]


async def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        EventHub().subscribe(capacity=0)


@pytest.mark.parametrize(
    ("types", "found"),
    [
        ("guest.ready", "'guest.ready'"),
        (GuestReady, "GuestReady"),
        (5, "5"),
        (["guest.raedy"], "'guest.raedy'"),
        ([GuestReady, Event], "Event"),
        ([None], "None"),
        ([b"guest.ready"], "b'guest.ready'"),
        ([["guest.ready"]], r"\['guest.ready'\]"),
    ],
)
async def test_a_subscription_to_what_is_no_type_of_event_is_refused(types: Any, found: str) -> None:
    hub = EventHub()
    with pytest.raises(ConfigError, match=f"found .*{found}"):
        hub.subscribe(types=types)
    assert not hub.listening


async def test_a_misspelt_type_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"guest\.ready, .*log\.lost"):
        EventHub().subscribe(types=["ready"])


async def test_leaving_the_block_stops_listening_and_wakes_who_waits() -> None:
    hub = EventHub()
    async with hub.subscribe() as subscription:
        assert hub.listening
        task = asyncio.create_task(read_all(subscription))
        await anyio.wait_all_tasks_blocked()
    assert await task == []
    hub.publish(GuestReady(1))
    assert not hub.listening


async def test_a_reader_that_breaks_out_is_forgotten() -> None:
    hub = EventHub()
    reader = asyncio.create_task(first_of(hub))
    await anyio.wait_all_tasks_blocked()
    hub.publish(GuestReady(1))
    assert await reader == GuestReady(1)
    del reader
    gc.collect()
    hub.publish(GuestReady(2))
    assert not hub.listening


async def first_of(hub: EventHub) -> Event:
    async for event in hub:
        return event
    raise AssertionError("no event")


async def test_cancelling_a_reader_loses_no_event() -> None:
    hub = EventHub()
    subscription = hub.subscribe()
    task = asyncio.create_task(subscription.__anext__())
    await anyio.wait_all_tasks_blocked()
    hub.publish(GuestReady(1))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await anext(subscription) == GuestReady(1)


async def test_a_sink_gets_every_event_and_one_that_raises_is_detached(caplog: pytest.LogCaptureFixture) -> None:
    hub, seen = EventHub(), list[Event]()

    def broken(event: Event) -> None:
        raise RuntimeError("boom")

    hub.attach(broken)
    detach = hub.attach(seen.append)
    with caplog.at_level(logging.ERROR, "asyncvmm.events"):
        for event in beats(1, 3):
            hub.publish(event)
    assert seen == beats(1, 3)
    assert len(caplog.records) == 1
    detach()
    assert not hub.listening


def test_a_hub_needs_no_loop_to_be_made_and_published_to() -> None:
    hub = EventHub()
    assert not hub.listening
    hub.publish(GuestReady(1))
    subscription = hub.subscribe()
    hub.publish(GuestPreExec(2))
    hub.close()
    assert asyncio.run(read_all(subscription)) == [GuestPreExec(2)]
