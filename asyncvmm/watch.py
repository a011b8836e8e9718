"""From effects to events: serial bytes become lines, lines become markers, markers become events. On the loop.

This is the middle of the data flow: a machine's effects come in at ``take``, and the hub, the console and whoever
waits for the guest's end hear of them in the order in which the guest caused them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from asyncvmm.console import Console
from asyncvmm.effects import Effect, Port, SerialOutput, Stopped
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.hub import EventHub
from asyncvmm.events.lines import Line, LineScanner
from asyncvmm.events.markers import (
    BootTime,
    ClockReading,
    GoDone,
    Heartbeat,
    Idle,
    InitError,
    InitWarning,
    Listener,
    Marker,
    Panic,
    PreExec,
    Ready,
    WorkloadExit,
)
from asyncvmm.events.types import (
    Event,
    GuestBootTime,
    GuestExit,
    GuestGoDone,
    GuestHeartbeat,
    GuestIdle,
    GuestListener,
    GuestPreExec,
    GuestReady,
    SerialLine,
)
from asyncvmm.timing.guest_clock import ClockPairing, GuestClock
from asyncvmm.timing.timeline import Timeline

_log = logging.getLogger("asyncvmm.guest")

GuestInstant = Callable[[int], tuple[int, int] | None]
"""Machine.guest_instant: the host's CLOCK_MONOTONIC ns at a value of the guest's TSC, and the error in ns."""


class GuestWatch:
    """Follows one guest, which must not have started yet. ``on_stop`` hears of its end; a kernel panic counts as one.

    ``serial_lines`` publishes every line as an event of its own. ``guest_instant`` is the machine's.
    """

    def __init__(
        self,
        hub: EventHub,
        console: Console,
        timeline: Timeline,
        on_stop: Callable[[Stopped], None],
        *,
        on_captured: Callable[[], None] = lambda: None,
        serial_lines: bool = False,
        guest_instant: GuestInstant = lambda tsc: None,
    ) -> None:
        self._serial_lines = serial_lines
        self.contract = GuestContract()
        self._hub = hub
        self._console = console
        self._timeline = timeline
        self._on_stop = on_stop
        self._on_captured = on_captured
        self._guest_instant = guest_instant
        self._pairing = ClockPairing(self._since_start(timeline.clock()))
        self._scanners: dict[Port, LineScanner] = {"console": LineScanner(), "control": LineScanner()}

    @property
    def guest_clock(self) -> GuestClock | None:
        """The guest's clock on the axis of ``t_ns``, as well as it is known by now; None before its first BOOT_TIME."""
        return self._pairing.clock

    def unfinished(self, port: Port) -> bytes:
        """What the guest has written there of a line that has no end yet."""
        return self._scanners[port].pending

    def go_on(self, contract: GuestContract, unfinished: Mapping[Port, bytes]) -> None:
        """Follow a guest that was saved when it had said so much."""
        self.contract = contract
        for port, text in unfinished.items():
            self._scanners[port].feed(text)

    def take(self, effects: Sequence[Effect]) -> None:
        """Take one batch from the machine."""
        for effect in effects:
            if isinstance(effect, SerialOutput):
                self._take_output(effect)
            else:
                self._on_stop(effect)

    def _take_output(self, output: SerialOutput) -> None:
        if output.port == "console":
            self._console.feed(output.data, output.lost)
        scanner = self._scanners[output.port]
        times = output.newlines
        if missing := output.data.count(b"\n") - len(times):
            # Never one that is too early: what is said of the guest's clock rests on it.
            times = (*times, *(self._timeline.clock(),) * missing)
        for line in scanner.feed(output.data, times):
            self._take_line(output, line)
        if output.lost:
            scanner.gap()

    def _take_line(self, output: SerialOutput, line: Line) -> None:
        t_ns = self._since_start(line.t_ns)
        if self._serial_lines and self._hub.listening:
            self._hub.publish(SerialLine.of(t_ns, output.port, line))
        capturing = self.contract.capturing
        marker = self.contract.line(output.port, line)
        if isinstance(marker, Panic):
            self._on_stop(Stopped("panic", detail=marker.detail, t_ns=line.t_ns))
        elif isinstance(marker, InitError):
            self._on_stop(Stopped("init-error", detail=marker.detail, t_ns=line.t_ns))
        elif isinstance(marker, InitWarning):
            _log.warning("the guest goes on without %s", marker.detail)
        elif isinstance(marker, ClockReading):
            self._take_reading(marker, t_ns)
        elif marker is not None:
            if isinstance(marker, BootTime):
                self._pairing.pair(marker.guest_ns, t_ns)
            self._hub.publish(event_of(marker, t_ns))
        if capturing and not self.contract.capturing:
            self._on_captured()

    def _take_reading(self, reading: ClockReading, t_ns: int) -> None:
        begin, end = self._guest_instant(reading.tsc), self._guest_instant(reading.tsc_end)
        if begin is None or end is None:
            return
        earliest, latest = self._since_start(begin[0] - begin[1]), self._since_start(end[0] + end[1])
        self._pairing.read_between(reading.ns, earliest, latest, t_ns)

    def _since_start(self, host_ns: int) -> int:
        return host_ns - self._timeline.start_ns


def event_of(marker: Marker, t_ns: int) -> Event:
    """The event that a marker of the guest contract is, ``t_ns`` after the VM's start."""
    match marker:
        case BootTime(stage, guest_ns):
            return GuestBootTime(t_ns, stage, guest_ns)
        case Ready():
            return GuestReady(t_ns)
        case PreExec():
            return GuestPreExec(t_ns)
        case Heartbeat(counter):
            return GuestHeartbeat(t_ns, counter)
        case Listener(proto, port):
            return GuestListener(t_ns, proto, port)
        case WorkloadExit(code):
            return GuestExit(t_ns, code)
        case GoDone(tsc, realtime_ns):
            return GuestGoDone(t_ns, realtime_ns, tsc)
        case Idle():
            return GuestIdle(t_ns)
        case Panic() | ClockReading() | InitError() | InitWarning():
            raise ValueError(f"{type(marker).__name__} is no event")
