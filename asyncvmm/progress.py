"""Progress: a boot as one live line on stderr, from its events alone; one line of summary is left behind.

Nothing of it is seen, or costs anything, where stderr is no terminal.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import attrs
from rich.text import Text

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import (
    AccelProbe,
    Event,
    GuestBootTime,
    GuestReady,
    PhaseEnded,
    SerialLine,
    VmError,
    VmState,
    VmTimingEvent,
)
from asyncvmm.terminal import StatusLine, printable, status_line
from asyncvmm.timing.boot_profile import duration_text

PERIOD_S = 0.1
"""The line is drawn anew this often."""

_REMEMBERED = 8

_AFTER = {"setup": "boot", "retry_pause": "setup"}
"""What begins when a phase has ended, where no other event says so: phases are told of as they end."""


@attrs.define
class Story:
    """What a boot is doing. ``step`` is the phase it is in, or the guest's last stage, since ``step_at`` (seconds).

    ``done`` is what lies behind it, the newest first; ``said`` is the console's last line, as the guest
    wrote it, if lines are events.
    """

    started: float
    step_at: float
    step: str = "accel"
    accel: str = ""
    said: str = ""
    done: deque[str] = attrs.field(factory=lambda: deque(maxlen=_REMEMBERED))

    @classmethod
    def begun(cls, now: float) -> Story:
        """That of a boot that begins now."""
        return cls(now, now)

    def take(self, event: Event, now: float) -> None:
        """Go on by one event."""
        step = self._step(event)
        if step is not None:
            self.step, self.step_at = step, now

    def _step(self, event: Event) -> str | None:
        match event:
            case AccelProbe():
                self.accel = event.accel
                return "setup"
            case PhaseEnded():
                return self._phase(event)
            case VmState(state="booting"):
                return "boot_wait"
            case GuestBootTime():
                self.done.appendleft(f"{event.stage} at {duration_text(event.guest_ns)}")
                return f"guest {event.stage}"
            case GuestReady():
                return "ready"
            case SerialLine(port="console"):
                self.said = event.text if event.text.strip() else self.said
        return None

    def _phase(self, phase: PhaseEnded) -> str | None:
        self.done.appendleft(f"{phase.name} {duration_text(phase.duration_ns)}{' (failed)' if phase.failed else ''}")
        if phase.failed:
            return "retry_pause" if phase.name == "boot" else None
        return _AFTER.get(phase.name)

    def text(self, now: float) -> Text:
        """The line: seconds in all, the step and its seconds, then what there is room for."""
        return Text.assemble(
            (f"{now - self.started:.1f} s ", "dim"),
            (self.step, "bold cyan"),
            f" {now - self.step_at:.1f} s",
            (f" on {self.accel}" if self.accel else "", "dim"),
            f" | {printable(self.said).strip()}" if self.said else "",
            (" | " + ", ".join(self.done) if self.done else "", "dim"),
        )

    def summary(self, timing: VmTimingEvent) -> str:
        """What is left to read when the guest is ready."""
        parts = {"setup": timing.setup_ms, "boot": timing.boot_ms, "guest_wait": timing.guest_wait_ms}
        spent = ", ".join(f"{name} {ms} ms" for name, ms in parts.items() if ms is not None)
        return f"ready in {timing.total_ms} ms on {self.accel}: {spent}"


class Progress:
    """``with Progress(vm.events, line):`` shows the VM's boot until an event of each of ``until`` has come.

    An error of the VM ends it, too, and so does the end of the block. To be used on the VM's loop.
    """

    def __init__(
        self,
        events: EventHub,
        line: StatusLine | None,
        until: tuple[type[Event], ...] = (VmTimingEvent,),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events = events
        self._line = line
        self._awaited = set(until)
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._detach: Callable[[], None] = lambda: None

    def __enter__(self) -> Progress:
        if self._line is not None:
            self._story = Story.begun(self._clock())
            self._detach = self._events.attach(self._take)
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _take(self, event: Event) -> None:
        self._story.take(event, self._clock())
        self._awaited.discard(type(event))
        if isinstance(event, VmTimingEvent) and self._line is not None:
            self._line.leave(self._story.summary(event))
        if not self._awaited or isinstance(event, VmError):
            self._stop()

    def _draw(self) -> None:
        if self._line is not None:
            self._line.show(self._story.text(self._clock()))
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._draw)

    def _stop(self) -> None:
        self._detach()
        if self._timer is not None:
            self._timer.cancel()
        if self._line is not None:
            self._line.close()
            self._line = None


def progress_line(jsonl: str | None) -> StatusLine | None:
    """Where to show progress: the terminal of stderr, unless JSON lines are shown there by way of stdout."""
    shared = jsonl == "-" and sys.stdout is not None and sys.stdout.isatty()
    return None if shared else status_line(sys.stderr)
