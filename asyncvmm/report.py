"""BootReport: what a timeline recorded, told: phases as they end; profiles, timing and log when the guest is ready.

Everything is derived from the phases, and only when somebody asks, listens or logs.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import (
    BootProfileEvent,
    CreateVmProfileEvent,
    PhaseEnded,
    RestoreProfileEvent,
    RuntimeRestoreProfileEvent,
    VcpuSetupProfileEvent,
    VmTimingEvent,
)
from asyncvmm.machine.base import AccelName
from asyncvmm.timing.boot_log import log_boot, log_command_loop
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.derive import (
    boot_profile,
    create_vm_profile,
    restore_profile,
    runtime_restore_profile,
    vcpu_setup_profile,
)
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.profiles import (
    CreateVmProfile,
    GuestBootProfile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
)
from asyncvmm.timing.timeline import Phase, Timeline
from asyncvmm.timing.vm_timing import VmTiming, boot_timing


class BootReport:
    """Reports on one VM. ``attempt`` is the boot attempt that its newest phases belong to."""

    def __init__(self, events: EventHub, timeline: Timeline) -> None:
        self.attempt = 0
        self.timing: VmTiming | None = None
        self._events = events
        self._timeline = timeline
        self._published = 0
        self._first = 0
        self._booted: Sequence[Phase] | None = None
        self._boot: BootProfile | None = None
        self._into_shell: bool | None = None

    def begin_attempt(self, attempt: int) -> None:
        """Phases from now on are those of this attempt."""
        self.attempt = attempt
        self._first = len(self._timeline.phases)

    def tell_phases(self) -> None:
        """Publish the phases that have ended since the last time."""
        phases = self._timeline.phases[self._published :]
        self._published += len(phases)
        if self._events.listening:
            for phase in phases:
                self._events.publish(PhaseEnded.of(phase, self._timeline.start_ns, self.attempt))

    def tell_ready(self, accel: AccelName, guest: GuestBootProfile, clock: GuestClock | None) -> VmTiming:
        """The attempt has succeeded: publish phases, timing and profiles, log the boot."""
        self._booted = self._phases
        self.timing = boot_timing(self._booted, accel, self.attempt)
        self.tell_phases()
        self._boot = self.boot_profile(guest)
        log_boot(self._boot)
        self.tell_captured(guest)
        if self._events.listening:
            self._publish(self.timing, self._boot, clock)
        return self.timing

    def tell_restored(self, *, into_shell: bool) -> None:
        """The VM was made of a snapshot, in a shell or from nothing: publish phases and profile."""
        self._booted, self._into_shell = self._phases, into_shell
        self.tell_phases()
        if self._events.listening:
            now = self._timeline.clock() - self._timeline.start_ns
            if (restore := self.restore_profile()) is not None:
                self._events.publish(RestoreProfileEvent(now, restore))
            if (runtime := self.runtime_restore_profile()) is not None:
                self._events.publish(RuntimeRestoreProfileEvent(now, runtime))

    def restore_profile(self) -> RestoreProfile | None:
        """The RestoreProfile; None for a VM that was not restored, or in a shell."""
        return restore_profile(self._phases) if self._into_shell is False else None

    def runtime_restore_profile(self) -> RuntimeRestoreProfile | None:
        """The RuntimeRestoreProfile; None for a VM that was not restored in a shell."""
        return runtime_restore_profile(self._phases) if self._into_shell else None

    def tell_captured(self, guest: GuestBootProfile) -> None:
        """The guest's last stage has come: it is logged once the others are."""
        if self._boot is not None:
            self._boot.guest = guest
            self._boot.capture_guest_boot_lines = guest.command_loop_ns is None
            log_command_loop(self._boot)

    def boot_profile(self, guest: GuestBootProfile) -> BootProfile:
        """The BootProfile; until an attempt has succeeded, of what the newest one has done."""
        return self._boot or boot_profile(self._phases, self._timeline.start_ns, guest)

    def create_vm_profile(self) -> CreateVmProfile:
        """The CreateVmProfile of the attempt that succeeded; until one has, of what the newest one has done."""
        return create_vm_profile(self._phases)

    def vcpu_setup_profile(self) -> VcpuSetupProfile | None:
        """The VcpuSetupProfile of that attempt; None while no vCPU is set up, and on QEMU."""
        return vcpu_setup_profile(self._phases)

    @property
    def _phases(self) -> Sequence[Phase]:
        """Those of the attempt that succeeded, which stay as they were then; until one has, of the newest one."""
        return self._timeline.phases[self._first :] if self._booted is None else self._booted

    def _publish(self, timing: VmTiming, boot: BootProfile, clock: GuestClock | None) -> None:
        now = self._timeline.clock() - self._timeline.start_ns
        self._events.publish(VmTimingEvent.of(now, timing))
        self._events.publish(BootProfileEvent(now, attrs.evolve(boot), clock))
        self._events.publish(CreateVmProfileEvent(now, self.create_vm_profile()))
        setup = self.vcpu_setup_profile()
        if setup is not None:
            self._events.publish(VcpuSetupProfileEvent(now, setup))
