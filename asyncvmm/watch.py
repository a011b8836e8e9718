"""From effects to events: serial bytes become lines, lines become markers, markers become events. On the loop.

This is the middle of the data flow: a machine's effects come in at ``take``, and the hub, the console and whoever
waits for the guest's end hear of them in the order in which the guest caused them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncvmm.console import Console
from asyncvmm.effects import Effect, SerialOutput, Stopped
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.hub import EventHub
from asyncvmm.events.lines import Line, LineScanner
from asyncvmm.events.markers import BootTime, Heartbeat, Listener, Marker, Panic, PreExec, Ready, WorkloadExit
from asyncvmm.events.types import (
    Event,
    GuestBootTime,
    GuestExit,
    GuestHeartbeat,
    GuestListener,
    GuestPreExec,
    GuestReady,
    SerialLine,
)
from asyncvmm.timing.timeline import Timeline


class GuestWatch:
    """Follows one guest. ``on_stop`` hears of its end; a kernel panic counts as one.

    ``serial_lines`` publishes every line as an event of its own.
    """

    def __init__(
        self,
        hub: EventHub,
        console: Console,
        timeline: Timeline,
        on_stop: Callable[[Stopped], None],
        *,
        serial_lines: bool = False,
    ) -> None:
        self._serial_lines = serial_lines
        self.contract = GuestContract()
        self._hub = hub
        self._console = console
        self._timeline = timeline
        self._on_stop = on_stop
        self._scanners = {"console": LineScanner(), "control": LineScanner()}

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
        for line in scanner.feed(output.data, output.newlines or (self._timeline.clock(),)):
            self._take_line(output, line)
        if output.lost:
            scanner.gap()

    def _take_line(self, output: SerialOutput, line: Line) -> None:
        t_ns = line.t_ns - self._timeline.start_ns
        if self._serial_lines and self._hub.listening:
            self._hub.publish(SerialLine.of(t_ns, output.port, line))
        marker = self.contract.line(output.port, line)
        if isinstance(marker, Panic):
            self._on_stop(Stopped("panic", detail=marker.detail, t_ns=line.t_ns))
        elif marker is not None:
            self._hub.publish(event_of(marker, t_ns))


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
        case Panic():
            raise ValueError("a panic is the guest's end, not an event")
