"""Waiting for a trigger: a running guest's events and output go to the pure deciders, until one says that it has come.

Nothing is polled, but signs of life while the guest may be idle. What has happened before the call counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack

import anyio
import attrs

from asyncvmm.console import Console, ConsoleReader
from asyncvmm.errors import TriggerImpossible
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, GuestExit, GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.predicate import (
    Activity,
    ConsoleOutput,
    Fact,
    LetRun,
    Met,
    Never,
    PortWrite,
    Predicate,
    Tracker,
    Waiting,
)
from asyncvmm.snapshot.predicates import MS_NS, S_NS, ConsoleMatch, Idle, PortWritten
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.triggers import Facts, Fired, decide, impossible

WatchPort = Callable[[int, int | None, Callable[[int], None]], Callable[[], None]]
"""Have a function called, on the loop, with the next byte that the guest writes to a port: this one, or any for None.

Returns what ends that. Raises ConfigError for a port that cannot be watched.
"""


async def wait_for_trigger(
    when: SnapshotResources | Predicate,
    events: EventHub,
    console: Console,
    activity: Callable[[], int] = lambda: 0,
    *,
    let_run: bool = False,
    watch_port: WatchPort | None = None,
    clock: Callable[[], int] = time.monotonic_ns,
) -> Fired:
    """Wait until ``when`` has come. Times that it names count from here.

    activity: a number that grows while the guest shows signs of life. let_run: the workload was, before the call, so
    that its pre-exec, though it is known of, does not count for a predicate. watch_port: None where the machine cannot
    tell of writes to ports. clock: monotonic, ns.

    Raises TriggerImpossible when the guest has ended, and when what is waited for cannot come any more; ConfigError for
    a port that cannot be watched. Cancelled or failed, it leaves nothing behind; any number may wait at the same time.
    """
    decider = _Policy(when, clock()) if isinstance(when, SnapshotResources) else _Combined(when, clock())
    watch = _Watch(decider, events, clock, activity if decider.needs_activity else None)
    async with AsyncExitStack() as stack:
        for port, value in decider.ports:
            stack.callback(watch.port(watch_port, port, value))
        reader = None
        if decider.reads_console:
            reader = console.subscribe()
            stack.push_async_callback(reader.aclose)
            watch.take(ConsoleOutput(console.tail, gap=True))
        if let_run:
            watch.take(LetRun())
        for event in events.past():
            watch.take(event)
        stack.callback(events.attach(watch.take))
        return await _wait(watch, reader)


async def _wait(watch: _Watch, reader: ConsoleReader | None) -> Fired:
    result: list[Fired | TriggerImpossible] = []
    async with anyio.create_task_group() as group:
        group.start_soon(watch.await_end)
        if reader is not None:
            group.start_soon(watch.read, reader)
        result.append(await watch.result())
        group.cancel_scope.cancel()
    if isinstance(result[0], TriggerImpossible):
        raise result[0]
    return result[0]


class _Policy:
    """SnapshotResources: its facts, and when time alone may change the decision."""

    ports: tuple[tuple[int, int | None], ...] = ()
    reads_console = needs_activity = False

    def __init__(self, resources: SnapshotResources, now_ns: int) -> None:
        self._resources = resources
        self._begin_ns = now_ns
        self._facts = Facts()

    def feed(self, fact: Fact, _: int) -> None:
        """Keep the newest heartbeat, and the first of everything else."""
        facts = self._facts
        match fact:
            case GuestHeartbeat():
                self._facts = attrs.evolve(facts, heartbeat=fact)
            case GuestPreExec():
                self._facts = attrs.evolve(facts, pre_exec=facts.pre_exec or fact)
            case GuestListener():
                self._facts = attrs.evolve(facts, listener=facts.listener or fact)
            case GuestExit():
                self._facts = attrs.evolve(facts, exit=facts.exit or fact)
            case GuestIdle():
                self._facts = attrs.evolve(facts, idle=facts.idle or fact)

    def decide(self, now_ns: int) -> Fired | Waiting | Never:
        """How it stands."""
        after_ms = self._resources.after_ms
        facts = attrs.evolve(self._facts, elapsed_ms=(now_ns - self._begin_ns) / MS_NS)
        if (fired := decide(self._resources, facts)) is not None:
            return fired
        if (why := impossible(self._resources, facts)) is not None:
            return Never(why)
        return Waiting(None if after_ms is None else self._begin_ns + after_ms * MS_NS)

    def __str__(self) -> str:
        return " or ".join(self._armed())

    def _armed(self) -> Iterator[str]:
        resources = self._resources
        if resources.at_heartbeat is not None:
            yield f"heartbeat {resources.at_heartbeat}"
        if resources.on_pre_exec:
            yield "pre-exec"
        if resources.on_listener:
            yield "a listener"
        if resources.after_ms is not None:
            yield f"{resources.after_ms} ms"


class _Combined:
    """A predicate."""

    def __init__(self, predicate: Predicate, now_ns: int) -> None:
        self._predicate = predicate
        self._tracker: Tracker = predicate.start(now_ns)
        leaves = list(predicate.leaves())
        self.ports = tuple({(leaf.port, leaf.value) for leaf in leaves if isinstance(leaf, PortWritten)})
        self.reads_console = any(isinstance(leaf, ConsoleMatch) for leaf in leaves)
        self.needs_activity = any(isinstance(leaf, Idle) for leaf in leaves)

    def feed(self, fact: Fact, now_ns: int) -> None:
        """Hand it to the predicate's tracker."""
        self._tracker.feed(fact, now_ns)

    def decide(self, now_ns: int) -> Fired | Waiting | Never:
        """How it stands."""
        outcome = self._tracker.outcome(now_ns)
        return Fired("predicate", outcome.detail, outcome.t_ns) if isinstance(outcome, Met) else outcome

    def __str__(self) -> str:
        return str(self._predicate)


class _Watch:
    """One wait: facts come in from everywhere, on the loop, and wake the one who decides."""

    def __init__(
        self,
        decider: _Policy | _Combined,
        events: EventHub,
        clock: Callable[[], int],
        activity: Callable[[], int] | None,
    ) -> None:
        self._decider = decider
        self._events = events
        self._clock = clock
        self._activity = activity
        self._awake = anyio.Event()

    def take(self, fact: Event | ConsoleOutput | PortWrite | LetRun) -> None:
        """A fact has come."""
        self._decider.feed(fact, self._clock())
        self._awake.set()

    def port(self, watch_port: WatchPort | None, port: int, value: int | None) -> Callable[[], None]:
        """Begin to watch a port; returns what ends it."""
        if watch_port is None:
            expected = "a machine that can tell of writes to ports"
            raise TriggerImpossible(str(self._decider), expected=expected, found="one that cannot")
        return watch_port(port, value, lambda written: self.take(PortWrite(port, written)))

    async def await_end(self) -> None:
        """Wake the one who decides when the guest has ended."""
        await self._events.stopped
        self._awake.set()

    async def read(self, reader: ConsoleReader) -> None:
        """Take the console's output."""
        lost = 0
        async for chunk in reader:
            self.take(ConsoleOutput(chunk, gap=reader.lost > lost))
            lost = reader.lost

    async def result(self) -> Fired | TriggerImpossible:
        """What it comes to."""
        while True:
            self._awake = anyio.Event()
            now_ns = self._clock()
            if self._events.stopped.done:
                return self._impossible("the guest has ended")
            if self._activity is not None:
                self._decider.feed(Activity(self._activity()), now_ns)
            outcome = self._decider.decide(now_ns)
            if isinstance(outcome, Never):
                return self._impossible(outcome.why)
            if isinstance(outcome, Fired):
                return outcome
            await self._sleep(outcome, now_ns)

    async def _sleep(self, waiting: Waiting, now_ns: int) -> None:
        delay_s = None if waiting.until_ns is None else max(0, waiting.until_ns - now_ns) / S_NS
        with anyio.move_on_after(delay_s):
            await self._awake.wait()

    def _impossible(self, found: str) -> TriggerImpossible:
        error = TriggerImpossible("snapshot trigger", expected=str(self._decider), found=found)
        error.__cause__ = self._events.error
        return error
