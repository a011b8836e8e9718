"""EventHub: one VM's events, to whoever listens: milestones to await, subscriptions to iterate, sinks to be called.

Everything here runs on the VM's loop; nothing here waits for a reader. Each subscription has a queue of its own; what
does not fit is dropped, newest first, and a ``log.lost`` event stands in its place.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal

import anyio

from asyncvmm.errors import AsyncVMMError, ConfigError, GuestStopped
from asyncvmm.events.milestones import Milestone, fresh
from asyncvmm.events.types import (
    EVENTS,
    Event,
    GuestExit,
    GuestHeartbeat,
    GuestIdle,
    GuestListener,
    GuestPreExec,
    GuestReady,
    LogLost,
)

CAPACITY = 1024
"""Events a subscription holds for a reader that is behind."""

MOST_LISTENERS = 1024
"""Listeners of a guest that are remembered."""

Sink = Callable[[Event], None]

_REMEMBERED = frozenset(
    kind.event for kind in (GuestReady, GuestPreExec, GuestListener, GuestExit, GuestIdle, GuestHeartbeat)
)

_log = logging.getLogger("asyncvmm.events")


class EventHub:
    """The events of one VM. May be made without a running loop.

    ``ready``, ``pre_exec``, ``listener`` (the first one) and ``idle`` give their event; ``exit`` gives the workload's
    exit code; ``stopped`` gives the reason in one word and never raises. The others raise GuestStopped if the VM stops
    first, or the VM's error if it dies. ``heartbeat`` is the newest one, None before the first.
    """

    def __init__(self) -> None:
        self.ready: Milestone[GuestReady] = Milestone("ready")
        self.pre_exec: Milestone[GuestPreExec] = Milestone("pre_exec")
        self.listener: Milestone[GuestListener] = Milestone("listener")
        self.exit: Milestone[int] = Milestone("exit")
        self.idle: Milestone[GuestIdle] = Milestone("idle")
        self.stopped: Milestone[str] = Milestone("stopped")
        self.error: AsyncVMMError | None = None
        self.heartbeat: GuestHeartbeat | None = None
        self._listeners: dict[tuple[str, int], GuestListener] = {}
        self._queues: tuple[_Queue, ...] = ()
        self._sinks: tuple[Sink, ...] = ()

    @property
    def listening(self) -> bool:
        """Whether anybody would see an event.

        If not, events need not be built, except those of the guest contract: milestones hang on them.
        """
        return bool(self._queues or self._sinks)

    def publish(self, event: Event) -> None:
        """Give the event to everybody who listens. Never raises, never waits."""
        if event.event in _REMEMBERED:
            self._remember(event)
        for queue in self._queues:
            if queue.closed:
                self._forget(queue)
            else:
                queue.put(event)
        for sink in self._sinks:
            try:
                sink(event)
            except Exception:
                _log.exception("an event sink failed and is detached: %r", sink)
                self._detach(sink)

    def past(self) -> Iterator[Event]:
        """What the guest has come to so far: its pre-exec, listeners (the first MOST_LISTENERS), newest heartbeat,
        idleness; each once, those that there are.
        """
        for event in (self.pre_exec.value, *self._listeners.values(), self.heartbeat, self.idle.value):
            if event is not None:
                yield event

    def recall(self, event: Event) -> None:
        """The guest had come to that when it was saved: it is remembered as if it had been told, and told to nobody.

        Only what ``past`` gives has a meaning.
        """
        if event.event in _REMEMBERED:
            self._remember(event)

    def attach(self, sink: Sink) -> Callable[[], None]:
        """Have ``sink`` called with every event, on the loop; a sink that raises is logged and detached.

        Returns a function that detaches it.
        """
        self._sinks = (*self._sinks, sink)
        return lambda: self._detach(sink)

    def subscribe(self, types: Iterable[type[Event] | str] | None = None, capacity: int = CAPACITY) -> Subscription:
        """Events from now on, in order; only those of ``types`` (classes or dotted names) if given.

        Raises ConfigError for a capacity below 1 and for types that are not those of events.
        """
        if capacity < 1:
            raise ConfigError("capacity of a subscription", expected="at least 1", found=capacity)
        queue = _Queue(None if types is None else _names(types), capacity)
        if self.stopped.done:
            queue.end(self.error)
        else:
            self._queues = (*self._queues, queue)
        return Subscription(queue)

    def __aiter__(self) -> Subscription:
        return self.subscribe()

    def close(self, reason: str = "stopped") -> None:
        """The VM has stopped as it should: iterations end after what is queued, pending milestones fail."""
        for milestone in self._milestones:
            milestone.fail(GuestStopped(f"the guest stopped before {milestone.name}", reason=reason))
        self._end(reason, None)

    def fail(self, error: AsyncVMMError) -> None:
        """The VM has died: iterations raise ``error`` after what is queued, pending milestones fail with it."""
        for milestone in self._milestones:
            milestone.fail(error)
        self._end(getattr(error, "reason", "error"), error)

    def _end(self, reason: str, error: AsyncVMMError | None) -> None:
        if not self.stopped.set(reason):
            return
        self.error = error
        for queue in self._queues:
            queue.end(error)
        self._queues = ()

    @property
    def _milestones(self) -> tuple[Milestone[Any], ...]:
        return self.ready, self.pre_exec, self.listener, self.exit, self.idle

    def _remember(self, event: Event) -> None:
        if isinstance(event, GuestHeartbeat):
            self.heartbeat = event
        elif isinstance(event, GuestReady):
            self.ready.set(event)
        elif isinstance(event, GuestPreExec):
            self.pre_exec.set(event)
        elif isinstance(event, GuestListener):
            self.listener.set(event)
            if len(self._listeners) < MOST_LISTENERS:
                self._listeners.setdefault((event.proto, event.port), event)
        elif isinstance(event, GuestExit):
            self.exit.set(event.code)
        elif isinstance(event, GuestIdle):
            self.idle.set(event)

    def _detach(self, sink: Sink) -> None:
        self._sinks = tuple(other for other in self._sinks if other is not sink)

    def _forget(self, queue: _Queue) -> None:
        self._queues = tuple(other for other in self._queues if other is not queue)


def _names(types: Iterable[type[Event] | str]) -> frozenset[str]:
    if isinstance(types, str) or not isinstance(types, Iterable):
        raise ConfigError("types of a subscription", expected="a sequence of event classes or names", found=repr(types))
    return frozenset(_name(kind) for kind in types)


def _name(kind: object) -> str:
    name = kind if isinstance(kind, str) else getattr(kind, "event", None)
    if not isinstance(name, str) or name not in EVENTS:
        raise ConfigError("type of a subscription", expected=f"one of {', '.join(EVENTS)}", found=repr(kind))
    return name


class Subscription:
    """An async iterator over a VM's events; also an async context manager. Ends as EventHub.close() and fail() say.

    One that is dropped without aclose() is noticed; it costs nothing further.
    """

    def __init__(self, queue: _Queue) -> None:
        self._queue = queue

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        queue = self._queue
        while not queue.events:
            if queue.closed:
                raise StopAsyncIteration
            if queue.ended:
                raise fresh(queue.error) if queue.error else StopAsyncIteration
            await queue.wait()
        return queue.events.popleft()

    async def aclose(self) -> None:
        """Stop listening; what is queued is forgotten. May be called again."""
        self._queue.close()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        await self.aclose()
        return False

    def __del__(self) -> None:
        # The collector may run this on any thread: a flag is all that may be touched. The hub forgets it at leisure.
        self._queue.closed = True


class _Queue:
    """What one subscription has yet to read."""

    def __init__(self, names: frozenset[str] | None, capacity: int) -> None:
        self.events: deque[Event] = deque()
        self.closed = False
        self.ended = False
        self.error: AsyncVMMError | None = None
        self._names = names
        self._capacity = capacity
        self._lost = 0
        self._lost_t_ns = 0
        self._awake: anyio.Event | None = None

    def put(self, event: Event) -> None:
        if self._names is not None and event.event not in self._names:
            return
        if len(self.events) >= self._capacity:
            self._lost += 1
            self._lost_t_ns = event.t_ns
            return
        self._confess()
        self.events.append(event)
        self._wake()

    def end(self, error: AsyncVMMError | None) -> None:
        self._confess()
        self.ended, self.error = True, error
        self._wake()

    def close(self) -> None:
        self.closed = True
        self.events.clear()
        self._wake()

    async def wait(self) -> None:
        if self._awake is None:
            self._awake = anyio.Event()
        await self._awake.wait()

    def _confess(self) -> None:
        if self._lost:
            self.events.append(LogLost(self._lost_t_ns, self._lost))
            self._lost = 0

    def _wake(self) -> None:
        if self._awake is not None:
            self._awake.set()
            self._awake = None
