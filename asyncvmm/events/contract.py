"""The guest contract: which lines of which serial port count, and when. Decides only; does nothing.

The control line is PID 1's alone and always counts. The console belongs to whoever writes there: BOOT_TIME, READY and
workload-pre-exec count on it until the workload starts, and never after, so that a workload cannot forge them. The
clock reading counts on the control line alone, once, before command_loop.
"""

from __future__ import annotations

from collections.abc import Mapping

from asyncvmm.effects import Port
from asyncvmm.events.lines import Line
from asyncvmm.events.markers import (
    BootTime,
    ClockReading,
    GoDone,
    InitError,
    InitWarning,
    Malformed,
    Marker,
    Panic,
    Parsed,
    PreExec,
    Ready,
    UnknownStage,
    parse_marker,
    parse_panic,
)
from asyncvmm.timing.profiles import GuestBootProfile

_ON_CONSOLE = (BootTime, UnknownStage, Ready, PreExec)


class GuestContract:
    """Follows one guest's two serial ports. ``malformed`` and ``ignored`` count markers that did not count.

    ``ready_on_control``: READY came on the control line, so PID 1 is ours and listens there. ``answers_go``: it has
    said there what only a PID 1 says that answers ``go``: its clock reading, or an answer.
    """

    def __init__(self) -> None:
        self.ready = False
        self.ready_on_control = False
        self.answers_go = False
        self.started = False
        self.panicked = False
        self.malformed = 0
        self.ignored = 0
        self._clock_read = False
        self._stages: dict[str, int] = {}

    @classmethod
    def of_saved(
        cls, *, has_pid1: bool, started: bool, stages: Mapping[str, int], answers_go: bool = False
    ) -> GuestContract:
        """That of a guest that was ready when it was saved. ``stages`` by field of GuestBootProfile."""
        contract = cls()
        contract.ready, contract.ready_on_control, contract.started = True, has_pid1, started
        contract.answers_go, contract._clock_read = answers_go, True
        contract._stages = {name.removesuffix("_ns"): ns for name, ns in stages.items()}
        return contract

    @property
    def capturing(self) -> bool:
        """Whether BOOT_TIME still counts: until command_loop has come."""
        return "command_loop" not in self._stages

    @property
    def profile(self) -> GuestBootProfile:
        """The boot stages recorded so far."""
        return GuestBootProfile(**{f"{stage}_ns": guest_ns for stage, guest_ns in self._stages.items()})

    def line(self, port: Port, line: Line) -> Marker | None:
        """Take the next line of ``port``; return the marker it is, if it counts."""
        if port == "console" and self.started:
            return None
        parsed = parse_marker(line.text)
        if line.truncated and parsed is not None:
            parsed = Malformed(line.text)
        if port == "control":
            self.ready_on_control |= isinstance(parsed, Ready)
            self.answers_go |= isinstance(parsed, ClockReading | GoDone)
            return self._admit(parsed)
        if isinstance(parsed, _ON_CONSOLE) or (isinstance(parsed, Malformed) and line.text.startswith(b"BOOT_TIME")):
            return self._admit(parsed)
        return self._panic(line.text)

    def _admit(self, parsed: Parsed | None) -> Marker | None:
        if isinstance(parsed, Malformed):
            self.malformed += 1
            return None
        if parsed is None:
            return None
        if isinstance(parsed, UnknownStage) or not self._counts(parsed):
            self.ignored += 1
            return None
        return parsed

    def _counts(self, marker: Marker) -> bool:
        if isinstance(marker, BootTime):
            return self._record(marker)
        if isinstance(marker, Ready):
            first, self.ready = not self.ready, True
            return first
        if isinstance(marker, PreExec):
            first, self.started = not self.started, True
            return first
        if isinstance(marker, ClockReading):
            first, self._clock_read = not self._clock_read, True
            return first and self.capturing
        if isinstance(marker, InitError | InitWarning):
            return not self.ready
        return True

    def _record(self, marker: BootTime) -> bool:
        if not self.capturing:
            return False
        self._stages[marker.stage] = marker.guest_ns
        return True

    def _panic(self, text: bytes) -> Panic | None:
        panic = None if self.panicked else parse_panic(text)
        self.panicked |= panic is not None
        return panic
