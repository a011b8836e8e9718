"""What JSON lines of asyncvmm record of VMs' boots and restores, as plain records: one ``Recording`` for each VM.

Times are nanoseconds since the VM's start, as ``t_ns`` is, except where a name says that it is the guest's clock.
Names are those of the events and of the design's timings; the text in them is the file's own, not made harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

TOTAL = "total"
"""The phase that holds all others of a boot."""

InstantKind = Literal["ready", "mark", "error", "lost"]


@attrs.frozen
class RecordedPhase:
    """A phase of host work. ``parent`` is the enclosing phase's name; ``residual_ns`` is None if the file has none.

    ``line`` is the number of its line in the file, from 1.
    """

    name: str
    start_ns: int
    duration_ns: int
    parent: str | None = None
    failed: bool = False
    attempt: int = 0
    residual_ns: int | None = None
    line: int = 0

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.start_ns + self.duration_ns


@attrs.frozen
class RecordedStage:
    """PID 1 reached ``name`` at ``guest_ns`` of its clock; the host had its line at ``arrived_ns``, None: not seen."""

    name: str
    guest_ns: int
    arrived_ns: int | None = None


@attrs.frozen
class RestoreStage:
    """A restore had come to ``name`` at ``t_ns``, ``since_call_ns`` after it was called for, which may be before the VM
    was made."""

    name: str
    t_ns: int
    since_call_ns: int


@attrs.frozen
class RecordedInstant:
    """Something that happened at ``t_ns``. ``reason`` says why, if it is something that went wrong."""

    label: str
    t_ns: int
    kind: InstantKind = "mark"
    reason: str | None = None


@attrs.frozen
class RecordedClock:
    """The guest's clock on the host's axis: t_ns = guest_ns + ``offset_ns``, off by at most ``error_ns``.

    ``source`` says how that is known: ``paired`` or ``tsc``.
    """

    offset_ns: int
    error_ns: int
    source: str


@attrs.frozen
class Recording:
    """One VM of one file. ``source`` is the file as it was named; the rest is what its lines said.

    ``restore``: the stages of its restore, in order; there are none if it was booted. ``made_of``: the snapshot that it
    is made of, as it said when it started. ``faults``: minor and major page faults until the last of the stages.
    """

    source: str
    vm: str
    phases: tuple[RecordedPhase, ...] = ()
    stages: tuple[RecordedStage, ...] = ()
    instants: tuple[RecordedInstant, ...] = ()
    restore: tuple[RestoreStage, ...] = ()
    faults: tuple[int, int] | None = None
    clock: RecordedClock | None = None
    accel: str | None = None
    made_of: str | None = None
    state: str | None = None
    lost_lines: int = 0
    timing: Mapping[str, int] = attrs.field(factory=dict)
    profile: Mapping[str, int] = attrs.field(factory=dict)
    exits: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def ready_ns(self) -> int | None:
        """When the guest said READY; None if it did not."""
        return next((instant.t_ns for instant in self.instants if instant.kind == "ready"), None)

    @property
    def what(self) -> str:
        """``boot`` or ``restore``."""
        return "restore" if self.restore or self.made_of is not None else "boot"

    @property
    def attempts(self) -> int:
        """How many boot attempts its phases are of; 1 if there are none."""
        return max((phase.attempt for phase in self.phases), default=0) + 1

    @property
    def complete(self) -> bool:
        """Whether it records a boot from its start to a good end: READY, or a ``total`` that did not fail; or a restore
        that came to something."""
        whole = any(phase.name == TOTAL and not phase.failed for phase in self.phases)
        return not self.failed and not self.cancelled and (whole or self._good)

    @property
    def failed(self) -> bool:
        """Whether it records a boot or a restore that did not succeed: an error or a failed phase, and neither READY
        nor a stage of a restore; none cancelled."""
        return self.broken and not self.cancelled

    @property
    def cancelled(self) -> bool:
        """Whether it records a boot that its caller ended: it broke off as a whole, and there was no error."""
        if not self.broken or self.state == "failed" or any(instant.kind == "error" for instant in self.instants):
            return False
        return self.state == "stopped" or any(phase.name == TOTAL and phase.failed for phase in self.phases)

    @property
    def _good(self) -> bool:
        return self.ready_ns is not None or bool(self.restore)

    @property
    def broken(self) -> bool:
        """Whether it failed or was cancelled."""
        if self._good:
            return False
        return any(instant.kind == "error" for instant in self.instants) or any(phase.failed for phase in self.phases)
