"""Events: one class for each thing that happens to a VM. Those of snapshots are beside this file.

Their names and fields are an interface: fields are only ever added within version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from asyncvmm.effects import ExitStatistics, Port
from asyncvmm.errors import AsyncVMMError, GuestError
from asyncvmm.events.base import Event as Event
from asyncvmm.events.base import event_class
from asyncvmm.events.lines import Line
from asyncvmm.events.snapshot_types import (
    RestoreFirstExit,
    RestoreFirstGuestEvent,
    RestoreMapped,
    RestoreStep,
    SnapshotFailedEvent,
    SnapshotSaved,
    SnapshotTrigger,
)
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.profiles import (
    CreateVmProfile,
    Profile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
)
from asyncvmm.timing.timeline import Phase
from asyncvmm.timing.vm_timing import VmTiming

if TYPE_CHECKING:
    from asyncvmm.timing.guest_clock import GuestClock


@event_class
class VmState(Event):
    """The VM went into ``state``; ``previous`` is the one it left, None for the first.

    ``exits`` counts its exits to userspace by reason, at its end, where the machine can tell. One that is made of a
    snapshot says so as it starts: ``snapshot`` is that one's id, ``accel`` the machine that made it and runs this one,
    ``clone`` its number among the clones that it is one of.
    """

    event: ClassVar[str] = "vm.state"

    state: str
    previous: str | None = None
    exits: Mapping[str, int] | None = None
    accel: str | None = None
    snapshot: str | None = None
    clone: int | None = None


@event_class
class AccelProbe(Event):
    """What was measured about the host's accelerators, and which was taken.

    ``requested`` is what was asked for, ``accel`` what was chosen; ``ring0_mips`` is million ring-0 instructions a
    second under KVM, ``exit_us`` the microseconds one exit costs.
    """

    event: ClassVar[str] = "accel.probe"

    accel: str
    requested: str | None = None
    verdict: str | None = None
    reason: str | None = None
    kvm_present: bool | None = None
    kvm_usable: bool | None = None
    kvm_api: int | None = None
    ring0_mips: float | None = None
    exit_us: float | None = None
    qemu_version: str | None = None


@event_class
class PhaseEnded(Event):
    """A phase of host work ended. ``start_ns`` counts from the VM's start, like ``t_ns``, which is the end.

    ``attempt`` numbers boot attempts from 0. ``residual_ns`` is what its direct children do not account for; None for a
    phase without any.
    """

    event: ClassVar[str] = "phase"

    name: str
    start_ns: int
    duration_ns: int
    parent: str | None = None
    failed: bool = False
    attempt: int = 0
    residual_ns: int | None = None

    @classmethod
    def of(cls, phase: Phase, vm_start_ns: int, attempt: int = 0) -> PhaseEnded:
        """The event of a timeline's phase, whose VM started at ``vm_start_ns`` (CLOCK_MONOTONIC)."""
        return cls(
            phase.end_ns - vm_start_ns,
            phase.name,
            phase.start_ns - vm_start_ns,
            phase.duration_ns,
            phase.parent,
            phase.failed,
            attempt,
            phase.residual_ns,
        )


@event_class
class GuestBootTime(Event):
    """PID 1 reached ``stage`` when its CLOCK_MONOTONIC read ``guest_ns``."""

    event: ClassVar[str] = "guest.boot_time"

    stage: str
    guest_ns: int


@event_class
class GuestReady(Event):
    """The guest said READY."""

    event: ClassVar[str] = "guest.ready"


@event_class
class GuestPreExec(Event):
    """The workload is forked, one step before its exec."""

    event: ClassVar[str] = "guest.pre_exec"


@event_class
class GuestHeartbeat(Event):
    """PID 1 is alive; ``counter`` grows from 1."""

    event: ClassVar[str] = "guest.heartbeat"

    counter: int


@event_class
class GuestListener(Event):
    """Something in the guest listens on ``port``."""

    event: ClassVar[str] = "guest.listener"

    proto: str
    port: int


@event_class
class GuestExit(Event):
    """The workload ended with exit status ``code``."""

    event: ClassVar[str] = "guest.exit"

    code: int


@event_class
class GuestGoDone(Event):
    """PID 1 has done what ``go`` asks: new entropy is mixed in, the clock is set. Only then a held workload runs.

    Its CLOCK_REALTIME was ``realtime_ns`` (ns since 1970) when its time stamp counter was ``tsc``.
    """

    event: ClassVar[str] = "guest.go_done"

    realtime_ns: int
    tsc: int


@event_class
class GuestIdle(Event):
    """PID 1 is alone: the workload and all that it left behind have ended, or there never was one."""

    event: ClassVar[str] = "guest.idle"


@event_class
class SerialLine(Event):
    """One line of a serial port. ``truncated``: the guest wrote more than the cap, or bytes of it were lost."""

    event: ClassVar[str] = "serial.line"

    port: Port
    text: str
    truncated: bool = False

    @classmethod
    def of(cls, t_ns: int, port: Port, line: Line) -> SerialLine:
        """The event of a scanned line; bytes that are not UTF-8 become U+FFFD."""
        return cls(t_ns, port, line.text.decode("utf-8", "replace"), line.truncated)

    def tell(self, record: dict[str, object]) -> None:
        """Add the details to ``record``. Spelt out: this is the event that comes by the hundred thousand."""
        record["port"] = self.port
        record["text"] = self.text
        record["truncated"] = self.truncated


@event_class
class VmTimingEvent(Event):
    """The VmTiming of the boot that just succeeded, its fields as they are there."""

    event: ClassVar[str] = "vm.timing"

    setup_ms: int | None = None
    boot_ms: int | None = None
    overlay_ms: int | None = None
    qemu_cmd_build_ms: int | None = None
    gvproxy_start_ms: int | None = None
    qemu_fork_ms: int | None = None
    guest_wait_ms: int | None = None
    boot_retries: int | None = None
    total_ms: int | None = None

    @classmethod
    def of(cls, t_ns: int, timing: VmTiming) -> VmTimingEvent:
        """The event of ``timing``."""
        return cls(t_ns, **timing.to_dict())


@event_class
class ProfileEvent(Event):
    """A profile is complete. In the line, its fields and derived totals stand beside the envelope, in ns."""

    profile: Profile

    def tell(self, record: dict[str, object]) -> None:
        """Add the profile's names and values, and their unit."""
        record["unit"] = "ns"
        record.update(self.profile.to_dict())


@event_class
class BootProfileEvent(ProfileEvent):
    """The BootProfile of the boot that just succeeded; marks count from the VM's start, like ``t_ns``.

    ``guest_clock`` ties the guest's clock to that axis; None where nothing is known of it.
    """

    event: ClassVar[str] = "boot.profile"

    profile: BootProfile
    guest_clock: GuestClock | None = None

    def tell(self, record: dict[str, object]) -> None:
        """Add the profile, and the guest's clock as an object of its own."""
        ProfileEvent.tell(self, record)
        if self.guest_clock is not None:
            record["guest_clock"] = attrs.asdict(self.guest_clock)


@event_class
class CreateVmProfileEvent(ProfileEvent):
    """The CreateVmProfile of the boot that just succeeded."""

    event: ClassVar[str] = "create_vm.profile"

    profile: CreateVmProfile


@event_class
class VcpuSetupProfileEvent(ProfileEvent):
    """The VcpuSetupProfile of the boot that just succeeded."""

    event: ClassVar[str] = "vcpu_setup.profile"

    profile: VcpuSetupProfile


@event_class
class RestoreProfileEvent(ProfileEvent):
    """The RestoreProfile of a restore."""

    event: ClassVar[str] = "restore.profile"

    profile: RestoreProfile


@event_class
class RuntimeRestoreProfileEvent(ProfileEvent):
    """The RuntimeRestoreProfile of a restore into a shell."""

    event: ClassVar[str] = "runtime_restore.profile"

    profile: RuntimeRestoreProfile


@event_class
class Metrics(Event):
    """The VM's metrics: ``groups`` by name, each a table of counters (what came since the flush before), stores (what
    is) and aggregates (``min_us``, ``max_us`` of all, ``sum_us`` of what came since).

    ``utc_timestamp_ms``: milliseconds since 1970. In the line, the groups stand beside it.
    """

    event: ClassVar[str] = "metrics"

    utc_timestamp_ms: int
    groups: Mapping[str, Mapping[str, int | dict[str, int]]]

    def tell(self, record: dict[str, object]) -> None:
        """Add the time, and each group by its name."""
        record["utc_timestamp_ms"] = self.utc_timestamp_ms
        record.update(self.groups)


@event_class
class VmError(Event):
    """An error, with its facts. ``kind`` is the error's class name, ``exits`` counts exits by reason."""

    event: ClassVar[str] = "vm.error"

    kind: str
    what: str
    expected: str | None = None
    found: str | None = None
    state: str | None = None
    reason: str | None = None
    last_exit: str | None = None
    rip: str | None = None
    exits: Mapping[str, int] | None = None
    phases: Mapping[str, int] | None = None
    serial_tail: str | None = None

    @classmethod
    def of(cls, t_ns: int, error: AsyncVMMError) -> VmError:
        """The event of ``error``, whatever its kind."""
        facts = {"kind": type(error).__name__, "what": error.what, "state": error.state}
        facts["expected"] = None if error.expected is None else str(error.expected)
        facts["found"] = None if error.found is None else str(error.found)
        if not isinstance(error, GuestError):
            return cls(t_ns, **facts)  # type: ignore[arg-type]
        return cls(
            t_ns,
            **facts,  # type: ignore[arg-type]
            reason=error.reason,
            last_exit=error.last_exit,
            rip=None if error.rip is None else hex(error.rip),
            exits=exit_counts(error.exits),
            phases=error.phases,
            serial_tail=error.serial_tail.decode("utf-8", "replace"),
        )


@event_class
class LogLost(Event):
    """``lines`` events were dropped here because their reader did not keep up."""

    event: ClassVar[str] = "log.lost"

    lines: int


EVENTS: Mapping[str, type[Event]] = {
    kind.event: kind
    for kind in (
        VmState,
        AccelProbe,
        PhaseEnded,
        GuestBootTime,
        GuestReady,
        GuestPreExec,
        GuestHeartbeat,
        GuestListener,
        GuestExit,
        GuestGoDone,
        GuestIdle,
        SerialLine,
        VmTimingEvent,
        BootProfileEvent,
        CreateVmProfileEvent,
        VcpuSetupProfileEvent,
        RestoreProfileEvent,
        RuntimeRestoreProfileEvent,
        SnapshotTrigger,
        SnapshotSaved,
        SnapshotFailedEvent,
        RestoreMapped,
        RestoreFirstExit,
        RestoreFirstGuestEvent,
        RestoreStep,
        Metrics,
        VmError,
        LogLost,
    )
}
"""Every kind of event by its dotted name."""


def exit_counts(exits: ExitStatistics | None) -> dict[str, int] | None:
    """Exits by reason, as events carry them."""
    return None if exits is None else {reason: entry.count for reason, entry in exits.by_reason.items()}
