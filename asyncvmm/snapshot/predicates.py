"""What a snapshot can wait for, to be put together by the caller.

    console(rb"ready") | port_write(0x7b) | after(ms=5000)
    listener(8080) & idle(0.05)

What has happened stays true: of ``a & b`` each may come at its time. ``idle`` alone is about the present: it is true
while the guest has been quiet for so long, so that ``console(rb"ready") & idle(1)`` waits for both at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import attrs

from asyncvmm.errors import ConfigError
from asyncvmm.events.base import Event
from asyncvmm.events.types import GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.predicate import (
    WAITING,
    Activity,
    ConsoleOutput,
    Fact,
    LetRun,
    Met,
    Never,
    Outcome,
    PortWrite,
    Predicate,
    Tracker,
    Waiting,
)
from asyncvmm.snapshot.resources import MAX_HEARTBEAT, MAX_MS, check_whole
from asyncvmm.snapshot.search import Pattern, StreamSearch, to_pattern

MS_NS = 1_000_000
S_NS = 1_000_000_000

_CHECKS_PER_IDLE = 4


def console(pattern: bytes | Pattern) -> Predicate:
    """The console's output, all in one, line ends and all, matches the regular expression ``pattern`` somewhere.

    The last 4 KiB written before the call count. A match may be search.WINDOW bytes long. Raises ConfigError for what
    is no regular expression of bytes, and for one that matches nothing at all.
    """
    return ConsoleMatch(to_pattern(pattern))


def port_write(port: int, value: int | None = None) -> Predicate:
    """The guest writes the byte ``value``, or any, to I/O port ``port``, at which no device is. On KVM alone. Writes
    before READY, and before the call, do not count.

    Raises ConfigError.
    """
    check_whole("port", port, 0, 0xFFFF)
    if value is not None:
        check_whole("value", value, 0, 0xFF)
    return PortWritten(port, value)


def idle(seconds: float) -> Predicate:
    """The guest has shown no sign of life for ``seconds``: nothing on the console, no event but heartbeats, no exit to
    the host other than for those. A guest that computes in silence is idle, too. Raises ConfigError.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_MS / 1000:
        raise ConfigError("idle", expected="seconds above 0", found=repr(seconds))
    return Idle(math.ceil(seconds * S_NS))


def heartbeat(count: int) -> Predicate:
    """PID 1 has counted to ``count``. Raises ConfigError."""
    check_whole("heartbeat", count, 1, MAX_HEARTBEAT)
    return _Heartbeat(count)


def pre_exec() -> Predicate:
    """The workload is one step before its exec; PID 1 holds it there, if it is asked before the boot, until the
    snapshot is taken. What is waited for besides, with ``&``, has to come without the workload.
    """
    return _PreExec()


def listener(port: int | None = None) -> Predicate:
    """Something in the guest listens on ``port``, or on any. Raises ConfigError."""
    if port is not None:
        check_whole("listener port", port, 1, 0xFFFF)
    return _Listener(port)


def after(ms: int) -> Predicate:
    """So many milliseconds after READY, or after the call if that is later. Raises ConfigError."""
    check_whole("after", ms, 0, MAX_MS)
    return _After(ms)


# -- how each is followed ----------------------------------------------------------------------------------------------


class _Latch(Tracker):
    """Once it has come it stays so; once it cannot come any more it stays so, too."""

    def __init__(self) -> None:
        self._outcome: Outcome = WAITING

    def feed(self, fact: Fact, now_ns: int) -> None:
        if self._outcome is WAITING:
            self._outcome = self._judge(fact)

    def outcome(self, now_ns: int) -> Outcome:
        return self._outcome

    @abstractmethod
    def _judge(self, fact: Fact) -> Outcome:
        """What the fact makes of it; WAITING for nothing."""


@attrs.frozen
class _PreExec(Predicate):
    def __str__(self) -> str:
        return "pre-exec"

    @property
    def wants_pre_exec(self) -> bool:
        """This is it."""
        return True

    def start(self, now_ns: int) -> Tracker:
        return _PreExecTracker()


class _PreExecTracker(_Latch):
    def _judge(self, fact: Fact) -> Outcome:
        if isinstance(fact, GuestPreExec):
            return Met("the workload is about to run", fact.t_ns)
        if isinstance(fact, LetRun):
            return Never("a workload that was let run (ask before boot)")
        return Never("the workload has ended") if isinstance(fact, GuestIdle) else WAITING


@attrs.frozen
class _Listener(Predicate):
    port: int | None

    def __str__(self) -> str:
        return "listener" if self.port is None else f"listener {self.port}"

    def start(self, now_ns: int) -> Tracker:
        return _ListenerTracker(self.port)


class _ListenerTracker(_Latch):
    def __init__(self, port: int | None) -> None:
        super().__init__()
        self._port = port

    def _judge(self, fact: Fact) -> Outcome:
        if isinstance(fact, GuestListener) and self._port in (None, fact.port):
            return Met(f"{fact.proto} port {fact.port}", fact.t_ns)
        return Never("nothing is left that could listen") if isinstance(fact, GuestIdle) else WAITING


@attrs.frozen
class _Heartbeat(Predicate):
    count: int

    def __str__(self) -> str:
        return f"heartbeat {self.count}"

    def start(self, now_ns: int) -> Tracker:
        return _HeartbeatTracker(self.count)


class _HeartbeatTracker(_Latch):
    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def _judge(self, fact: Fact) -> Outcome:
        come = isinstance(fact, GuestHeartbeat) and fact.counter >= self._count
        return Met(f"heartbeat {fact.counter}", fact.t_ns) if come and isinstance(fact, GuestHeartbeat) else WAITING


@attrs.frozen
class PortWritten(Predicate):
    """See port_write."""

    port: int
    value: int | None

    def __str__(self) -> str:
        return f"port {self.port:#x}" if self.value is None else f"{self.value:#x} at port {self.port:#x}"

    def start(self, now_ns: int) -> Tracker:
        return _PortTracker(self.port, self.value)


class _PortTracker(_Latch):
    def __init__(self, port: int, value: int | None) -> None:
        super().__init__()
        self._port, self._value = port, value

    def _judge(self, fact: Fact) -> Outcome:
        if isinstance(fact, PortWrite) and fact.port == self._port and self._value in (None, fact.value):
            return Met(f"{fact.value:#x} to port {fact.port:#x}")
        return WAITING


@attrs.frozen
class _After(Predicate):
    ms: int

    def __str__(self) -> str:
        return f"{self.ms} ms"

    def start(self, now_ns: int) -> Tracker:
        return _AfterTracker(self.ms, now_ns)


class _AfterTracker(Tracker):
    def __init__(self, ms: int, now_ns: int) -> None:
        self._ms, self._until_ns = ms, now_ns + ms * MS_NS

    def feed(self, fact: Fact, now_ns: int) -> None:
        """Time alone counts."""

    def outcome(self, now_ns: int) -> Outcome:
        return Met(f"{self._ms} ms") if now_ns >= self._until_ns else Waiting(self._until_ns)


@attrs.frozen
class ConsoleMatch(Predicate):
    """See console."""

    pattern: Pattern

    def __str__(self) -> str:
        return f"console {self.pattern.pattern!r}"

    def start(self, now_ns: int) -> Tracker:
        return _ConsoleTracker(self.pattern)


class _ConsoleTracker(Tracker):
    def __init__(self, pattern: Pattern) -> None:
        self._search = StreamSearch(pattern)

    def feed(self, fact: Fact, now_ns: int) -> None:
        if isinstance(fact, ConsoleOutput):
            self._search.feed(fact.data, now_ns, gap=fact.gap)

    def outcome(self, now_ns: int) -> Outcome:
        found = self._search.look(now_ns)
        return Waiting(self._search.until_ns) if found is None else Met(f"console {found[:80]!r}")


@attrs.frozen
class Idle(Predicate):
    """See idle. ``quiet_ns``: for how long."""

    quiet_ns: int

    def __str__(self) -> str:
        return f"idle {self.quiet_ns / S_NS:g} s"

    def start(self, now_ns: int) -> Tracker:
        return _IdleTracker(self.quiet_ns, now_ns)


class _IdleTracker(Tracker):
    def __init__(self, quiet_ns: int, now_ns: int) -> None:
        self._quiet_ns = quiet_ns
        self._since_ns = self._looked_ns = now_ns
        self._count: int | None = None

    def feed(self, fact: Fact, now_ns: int) -> None:
        if isinstance(fact, Activity):
            self._looked_ns = now_ns
            if fact.count == self._count:
                return
            self._count = fact.count
        elif not _is_of_the_guest(fact):
            return
        self._since_ns = now_ns

    def outcome(self, now_ns: int) -> Outcome:
        if now_ns - self._since_ns >= self._quiet_ns:
            return Met(f"idle for {(now_ns - self._since_ns) // MS_NS} ms")
        # Exits are only seen by looking: now and then, so that the time of the last one is known well enough.
        return Waiting(min(self._since_ns + self._quiet_ns, self._looked_ns + self._quiet_ns // _CHECKS_PER_IDLE + 1))


def _is_of_the_guest(fact: Fact) -> bool:
    if isinstance(fact, Event):
        return fact.event.startswith("guest.") and not isinstance(fact, GuestHeartbeat)
    return not isinstance(fact, LetRun)
