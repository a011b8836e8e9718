"""What a KVM machine does for snapshots: be restored, be saved, say how it came to life. On the loop.

Most machines are neither saved nor restored: what that takes is imported when it is first wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncvmm.errors import StateError
from asyncvmm.machine.kvm.building import Building, device_section
from asyncvmm.machine.kvm.devices import DeviceSet
from asyncvmm.machine.kvm.faults import NO_FAULTS, Faults
from asyncvmm.machine.kvm.marks import RestoreMarks
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.machine.waiting import in_thread, in_thread_or_here
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.launch import Launch
    from asyncvmm.machine.kvm.restoring import Shell
    from asyncvmm.machine.kvm.saving import Saving
    from asyncvmm.machine.saved import RestorePlan


class Snapshots:
    """Of one machine, which says whether its state allows a call. on_first_exit: called on the loop, once."""

    def __init__(self, building: Building, devices: DeviceSet | None, timeline: Timeline) -> None:
        self.marks: RestoreMarks | None = None
        self.on_first_exit: Callable[[RestoreMarks], None] | None = None
        self._building = building
        self._devices = devices
        self._timeline = timeline
        self._saving: Saving | None = None
        self._origin: str | None = None
        self._closed = False

    # -- restored ----------------------------------------------------------------------------------------------------

    async def restore(self, plan: RestorePlan, shell: Shell | None, fail: Callable[[Exception], None]) -> None:
        """Build the machine, its vCPUs' threads waiting. ``fail`` hears of a device of ours that goes wrong.

        Raises SnapshotDamaged, SnapshotMismatch, HostError, ConfigError.
        """
        building, devices = self._building, self._devices
        if devices is None:
            await run_in_thread(lambda: building.rebuild(plan, shell))
            return
        section = device_section(plan.saved)
        with self._timeline.phase("device_open"):
            await devices.open()
        await run_in_thread(lambda: building.recreate(plan, shell))
        if building.vm is not None and not building.given_up:
            with self._timeline.phase("device_state_restore"):
                devices.fit(building.vm, fail, state=section)
            await run_in_thread(building.hold)

    async def adopt(self, plan: RestorePlan, launch: Launch) -> bool:
        """Build the machine around a VM that is being launched. False if this host was not known well enough for that:
        nothing is built then. Raises as ``restore``, and StateError if the machine is stopped meanwhile."""
        from asyncvmm.machine.kvm.restoring import LearnedError

        building = self._building
        building.expect(launch, plan)
        try:
            await launch.mapped()
            if building.given_up:
                raise StateError("start", expected="a machine that nobody stops meanwhile", state="closed")
            building.adopt(launch, plan)
        except LearnedError:
            await launch.aclose()
            building.forget()
            return False
        return True

    def mark(self, vm: KvmVm, tell: Callable[[], object], launch: Launch | None = None) -> None:
        """It is restored. ``tell`` is called on a vCPU's thread, at the first exit."""
        self.marks = marks = RestoreMarks(time.monotonic_ns() if launch is None else launch.mapped_ns)
        if launch is not None and launch.opened:
            marks.resumed_ns = marks.mapped_ns
        marks.watch(vm.vcpus, tell)

    def first_exit(self) -> None:
        """It was told."""
        marks = self.marks
        assert marks is not None
        for span in marks.resume_span():
            self._timeline.record(span)
        if self.on_first_exit is not None:
            self.on_first_exit(marks)

    def resuming(self) -> None:
        """The vCPUs are about to be let go. Raises StateError while they must be held."""
        if self._saving is not None and self._saving.busy:
            raise StateError("resume", expected="a machine that is not being saved", state="saving")
        if self.marks is not None and self.marks.resumed_ns is None:
            self.marks.resumed_ns = time.monotonic_ns()

    def resumed(self) -> None:
        """They are."""
        if self._saving is not None:
            self._saving.settle_soon()

    def faults(self) -> Faults:
        """Page faults of the vCPUs' threads so far."""
        vm = self._building.vm
        return sum((vcpu.faults() for vcpu in vm.vcpus), NO_FAULTS) if vm is not None else NO_FAULTS

    # -- saved -------------------------------------------------------------------------------------------------------

    def saved_as(self, name: str) -> None:
        """See Machine. Of a machine that was restored and not saved yet, it is the name of what it was restored
        from."""
        if self._saving is None:
            self._origin = name
        else:
            self._saving.saved_as(name)

    async def saver(self) -> Saving:
        """What saves; to make the first one of a process takes longer than to save a small VM. Raises StateError."""
        if self._saving is None:
            saving = await in_thread(self._make_saving)
            if self._closed:
                raise StateError("save", expected="a machine that nobody stops meanwhile", state="closed")
            if self._saving is None:
                self._saving = saving
        return self._saving

    def _make_saving(self) -> Saving:
        from asyncvmm.machine.kvm.saving import saving_of

        saving = saving_of(self._building, self._devices)
        if self._origin is not None:
            saving.saved_as(self._origin)
        return saving

    async def aclose(self) -> None:
        """End what is under way, let nothing begin."""
        self._closed = True
        if self._saving is not None:
            await self._saving.aclose()


async def close_shell(shell: Shell | None) -> None:
    """Free what is left of one that was handed over."""
    if shell is not None and shell.made is not None:
        await in_thread_or_here(shell.close)
