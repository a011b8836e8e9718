"""Waiting for triggers, with a guest that is played by the test: its events, its console, its signs of life."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.console import Console
from asyncvmm.errors import ConfigError, GuestStopped, TriggerImpossible
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import GuestExit, GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.predicate import Predicate
from asyncvmm.snapshot.predicates import MS_NS, after, console, heartbeat, idle, listener, port_write, pre_exec
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.triggers import Fired
from asyncvmm.snapshot.watcher import WatchPort, wait_for_trigger

pytestmark = pytest.mark.anyio

LONG_S = 20.0


async def nowhere(data: bytes) -> None:
    """Take what is written."""


@attrs.define
class Ports:
    """A machine's ports: who watches which."""

    watched: list[tuple[int, int | None, Callable[[int], None]]] = attrs.field(factory=list)

    def watch(self, port: int, value: int | None, told: Callable[[int], None]) -> Callable[[], None]:
        if port == 0x3F8:
            raise ConfigError("watched port", expected="one without a device", found="com1")
        entry = (port, value, told)
        self.watched.append(entry)
        return lambda: self.watched.remove(entry)


@attrs.define
class Guest:
    """A guest, and those who wait for it."""

    events: EventHub = attrs.field(factory=EventHub)
    console: Console = attrs.field(factory=lambda: Console(nowhere))
    ports: Ports = attrs.field(factory=Ports)
    clock: Callable[[], int] = time.monotonic_ns
    signs: int = 0
    looks: int = 0

    def activity(self) -> int:
        self.looks += 1
        return self.signs

    async def is_looked_at(self) -> None:
        """Wait for the next look for signs."""
        before = self.looks
        with anyio.fail_after(LONG_S):
            while self.looks == before:  # noqa: ASYNC110 (nobody tells)
                await anyio.sleep(0.001)

    async def fires(self, when: SnapshotResources | Predicate, watch_port: WatchPort | None = None) -> Fired:
        with anyio.fail_after(LONG_S):
            watch_port = watch_port or self.ports.watch
            return await wait_for_trigger(
                when, self.events, self.console, self.activity, watch_port=watch_port, clock=self.clock
            )

    @asynccontextmanager
    async def waiting(self, when: SnapshotResources | Predicate) -> AsyncIterator[list[Fired | TriggerImpossible]]:
        """Somebody waits for it in the block, and has it by the block's end."""
        result: list[Fired | TriggerImpossible] = []

        async def wait() -> None:
            try:
                result.append(await self.fires(when))
            except TriggerImpossible as error:
                result.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await self.settle()
            yield result

    async def settle(self) -> None:
        """Let everybody who is awake have their turn."""
        for _ in range(10):
            await anyio.lowlevel.checkpoint()

    @property
    def left_behind(self) -> list[object]:
        """What waiting has left: nothing but a closed reader, which goes with the next output."""
        open_readers = [reader for reader in self.console._readers if not reader.closed]
        return [*self.events._sinks, *open_readers, *self.ports.watched]


@pytest.fixture
def guest() -> Guest:
    return Guest()


async def test_a_pre_exec_fires_when_it_comes(guest: Guest) -> None:
    async with guest.waiting(SnapshotResources(on_pre_exec=True)) as result:
        guest.events.publish(GuestHeartbeat(3, 1))
        await guest.settle()
        assert result == []
        guest.events.publish(GuestPreExec(5))
    assert result == [Fired("pre_exec", "the workload is about to run", 5)]
    assert guest.left_behind == []


@pytest.mark.parametrize(
    ("when", "fired"),
    [
        (SnapshotResources(on_pre_exec=True), Fired("pre_exec", "the workload is about to run", 1)),
        (SnapshotResources(on_listener=True), Fired("listener", "tcp port 22", 2)),
        (SnapshotResources(at_heartbeat=2), Fired("heartbeat", "heartbeat 4", 6)),
        (listener(80), Fired("predicate", "tcp6 port 80", 3)),
        (heartbeat(4) & pre_exec(), Fired("predicate", "heartbeat 4 and the workload is about to run", 6)),
        (console(b"rea(d)y"), Fired("predicate", "console b'ready'")),
    ],
    ids=str,
)
async def test_what_has_happened_before_counts(guest: Guest, when: SnapshotResources | Predicate, fired: Fired) -> None:
    for event in (
        GuestPreExec(1),
        GuestListener(2, "tcp", 22),
        GuestListener(3, "tcp6", 80),
        GuestHeartbeat(5, 3),
        GuestHeartbeat(6, 4),
    ):
        guest.events.publish(event)
    guest.console.feed(b"one\ntwo ready\n", 0)
    assert await guest.fires(when) == fired
    assert guest.left_behind == []


async def test_time_alone_fires(guest: Guest) -> None:
    assert await guest.fires(SnapshotResources(after_ms=20, on_listener=True)) == Fired("after", "20 ms")
    assert await guest.fires(after(20) | listener()) == Fired("predicate", "20 ms")


async def test_a_guest_that_is_idle_without_a_listener_is_parked(guest: Guest) -> None:
    async with guest.waiting(SnapshotResources(on_listener=True)) as result:
        guest.events.publish(GuestExit(5, 0))
        await guest.settle()
        assert result == []  # what it left behind may listen yet
        guest.events.publish(GuestIdle(6))
    assert result == [Fired("parked", "no listener can come any more", 6)]


async def test_it_is_impossible_for_who_does_not_want_it_parked(guest: Guest) -> None:
    async with guest.waiting(SnapshotResources(on_listener=True, or_parked=False)) as result:
        guest.events.publish(GuestExit(5, 3))
        await guest.settle()
        assert result == []  # what it left behind may listen yet
        guest.events.publish(GuestIdle(6))
    assert isinstance(result[0], TriggerImpossible)
    assert (result[0].expected, result[0].found) == ("a listener", "the workload has ended with exit code 3")
    assert guest.left_behind == []


async def test_what_does_not_rest_on_the_workload_is_waited_for_all_the_same(guest: Guest) -> None:
    guest.events.publish(GuestIdle(6))
    assert await guest.fires(SnapshotResources(on_listener=True, after_ms=20, or_parked=False)) == Fired(
        "after", "20 ms"
    )
    async with guest.waiting(SnapshotResources(on_listener=True, at_heartbeat=2, or_parked=False)) as result:
        guest.events.publish(GuestHeartbeat(7, 2))
    assert result == [Fired("heartbeat", "heartbeat 2", 7)]


async def test_a_predicate_that_cannot_come_any_more_is_impossible(guest: Guest) -> None:
    async with guest.waiting(listener(80) | pre_exec()) as result:
        guest.events.publish(GuestIdle(6))
    assert isinstance(result[0], TriggerImpossible)
    assert result[0].expected == "listener 80 | pre-exec"
    assert result[0].found == "nothing is left that could listen and the workload has ended"
    assert guest.left_behind == []


async def test_output_in_pieces_is_one_stream(guest: Guest) -> None:
    guest.console.feed(b"re", 0)
    async with guest.waiting(console(b"ready")) as result:
        for byte in (b"a", b"d", b"y"):
            assert result == []
            guest.console.feed(byte, 0)
            await guest.settle()
    assert result == [Fired("predicate", "console b'ready'")]


async def test_output_that_was_lost_joins_nothing(guest: Guest) -> None:
    async with guest.waiting(console(b"ready")) as result:
        guest.console.feed(b"rea", 0)
        await anyio.sleep(0.02)
        guest.console.feed(b"", 5)
        guest.console.feed(b"dy", 0)
        await anyio.sleep(0.02)
        assert result == []
        guest.console.feed(b" ready", 0)
    assert len(result) == 1


async def test_an_idle_guest_fires_and_one_that_shows_signs_of_life_does_not() -> None:
    now_ns = 0
    guest = Guest(clock=lambda: now_ns)
    async with guest.waiting(idle(0.02)) as result:
        for _ in range(15):
            now_ns += 19 * MS_NS
            guest.signs += 1
            await guest.is_looked_at()
        assert result == []
        now_ns += 20 * MS_NS
    assert result == [Fired("predicate", "idle for 20 ms")]


async def test_a_write_to_a_port_fires(guest: Guest) -> None:
    async with guest.waiting(port_write(0x7B, 3) | port_write(0x7C)) as result:
        told = {(port, value): told for port, value, told in guest.ports.watched}
        assert set(told) == {(0x7B, 3), (0x7C, None)}
        told[0x7C, None](9)
    assert result == [Fired("predicate", "0x9 to port 0x7c")]
    assert guest.left_behind == []


async def test_a_port_that_cannot_be_watched_is_refused_and_nothing_stays(guest: Guest) -> None:
    with pytest.raises(ConfigError, match="com1"):
        await guest.fires(port_write(0x7B) & console(b"x") & port_write(0x3F8))
    assert guest.left_behind == []
    with pytest.raises(TriggerImpossible, match="writes to ports"):
        await wait_for_trigger(port_write(0x7B), guest.events, guest.console)


async def test_a_guest_that_ends_makes_everything_impossible(guest: Guest) -> None:
    error = GuestStopped("guest", reason="panic")
    policy, predicate = SnapshotResources(at_heartbeat=3, after_ms=60_000), console(b"ready") | after(60_000)
    async with guest.waiting(policy) as one, guest.waiting(predicate) as other:
        guest.events.fail(error)
        guest.console.end()
    for result in (one, other):
        assert isinstance(result[0], TriggerImpossible)
        assert result[0].found == "the guest has ended"
        assert result[0].__cause__ is error
    assert isinstance(one[0], TriggerImpossible)
    assert one[0].expected == "heartbeat 3 or 60000 ms"
    assert guest.left_behind == []


async def test_a_guest_that_has_ended_before_is_not_waited_for(guest: Guest) -> None:
    guest.events.publish(GuestPreExec(1))
    guest.events.close("shutdown")
    guest.console.end()
    for when in (SnapshotResources(on_pre_exec=True), pre_exec(), idle(1)):
        with pytest.raises(TriggerImpossible, match="the guest has ended"):
            await guest.fires(when)
    assert guest.left_behind == []


async def test_the_exec_of_a_workload_that_was_let_run_is_no_pre_exec_any_more(guest: Guest) -> None:
    guest.events.publish(GuestPreExec(1))
    with anyio.fail_after(LONG_S):
        fired = await wait_for_trigger(pre_exec() | after(0), guest.events, guest.console, let_run=True)
        assert fired == Fired("predicate", "0 ms")
        with pytest.raises(TriggerImpossible, match="let run"):
            await wait_for_trigger(pre_exec() & idle(1), guest.events, guest.console, let_run=True)
    assert guest.left_behind == []


async def test_who_is_cancelled_leaves_nothing_behind(guest: Guest) -> None:
    with anyio.move_on_after(0.02):
        await guest.fires(console(b"ready") & port_write(0x7B) & idle(5) | listener())
    assert guest.left_behind == []


async def test_several_wait_at_once_each_for_its_own(guest: Guest) -> None:
    policies = [SnapshotResources(at_heartbeat=count) for count in (1, 2)]
    async with (
        guest.waiting(policies[0]) as first,
        guest.waiting(policies[1]) as second,
        guest.waiting(heartbeat(2)) as third,
    ):
        guest.events.publish(GuestHeartbeat(1, 1))
        await guest.settle()
        assert len(first) == 1
        assert second == third == []
        guest.events.publish(GuestHeartbeat(2, 2))
    assert [*second, *third] == [Fired("heartbeat", "heartbeat 2", 2), Fired("predicate", "heartbeat 2", 2)]
    assert guest.left_behind == []


async def test_a_flood_of_output_does_not_keep_it_from_firing(guest: Guest) -> None:
    async with guest.waiting(console(b"ready$")) as result:
        for _ in range(200):
            guest.console.feed(b"x" * 65536, 0)
            await anyio.lowlevel.checkpoint()
        guest.console.feed(b"ready", 0)
    assert len(result) == 1
