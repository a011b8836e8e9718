"""The in-process KVM machine: a KvmVm, its Board, its vCPU threads, and the loop's side of them.

vCPU threads answer register accesses on their own. What those cause reaches the loop through one mailbox as a *notice*:
this port has output, this port has room, the guest has stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal

from asyncvmm.effects import Port, Stopped
from asyncvmm.errors import KvmIoctlError, MachineError, StateError
from asyncvmm.machine.base import AccelName, BootPlan, EffectSink, Evidence
from asyncvmm.machine.kvm.building import Building, Joints
from asyncvmm.machine.kvm.counting import Counting
from asyncvmm.machine.kvm.devices import DeviceSet
from asyncvmm.machine.kvm.input import Input
from asyncvmm.machine.kvm.notices import FirstExit, HasOutput, HasRoom, Notice, Notices
from asyncvmm.machine.kvm.output import Output
from asyncvmm.machine.kvm.platform import Board, Outlets, SerialPort
from asyncvmm.machine.kvm.port_watches import PortWatches, PortWritten
from asyncvmm.machine.kvm.readings import Readings
from asyncvmm.machine.kvm.snapshots import Snapshots, close_shell
from asyncvmm.machine.kvm.tracing import TracedExit, TraceSink, Tracing
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.machine.waiting import in_thread_or_here, wait_out
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.faults import Faults
    from asyncvmm.machine.kvm.launch import Launch
    from asyncvmm.machine.kvm.marks import RestoreMarks
    from asyncvmm.machine.kvm.restoring import Shell
    from asyncvmm.machine.kvm.saving import Saving
    from asyncvmm.machine.kvm.vcpu import Vcpu
    from asyncvmm.machine.saved import RestorePlan, SavedMachine
    from asyncvmm.snapshot.memory_map import Run
    from asyncvmm.snapshot.memory_writer import MemoryWriter

_log = logging.getLogger("asyncvmm.machine")

_PARK_TIMEOUT_S = 5.0
"""Seconds for a kicked vCPU to leave the guest; it takes tens of microseconds."""


_State = Literal["new", "running", "paused", "ended", "closed"]


class KvmMachine(Readings):
    """Machine (see machine.base) on /dev/kvm, its vCPUs threads of this process."""

    accel: AccelName = "kvm"

    def __init__(
        self, plan: BootPlan, timeline: Timeline, on_effects: EffectSink, metrics: VmMetrics | None = None
    ) -> None:
        """``metrics``: what its devices count in; None for nowhere."""
        metrics = VmMetrics() if metrics is None else metrics
        self._plan = plan
        self._devices = DeviceSet(plan, metrics) if plan.devices.count else None
        self._timeline = timeline
        self._output = Output(on_effects)
        self._state: _State = "new"
        self._input = Input(lambda: self._state if self._state in ("ended", "closed") else None)
        self._tracing = Tracing(lambda traced: self._notices.post(traced))
        self._port_watches = PortWatches(lambda written: self._notices.post(written))
        joints = Joints(outlets=self._outlets, halt=self._halt, output=self._output, devices=self._devices)
        self._building = Building(plan, timeline, joints)
        self._counting = Counting(self._building)
        self._snapshots = Snapshots(self._building, self._devices, timeline)
        self._freeing: asyncio.Task[None] | None = None
        self.meter(metrics)

    @property
    def _vm(self) -> KvmVm | None:
        return self._building.vm

    @property
    def _board(self) -> Board | None:
        return self._building.board

    # -- the Machine protocol --------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Read the files and decide the layout."""
        self._require_new("prepare")
        try:
            if self._devices is not None:
                with self._timeline.phase("device_open"):
                    await self._devices.open()
            await run_in_thread(self._building.prepare)
        except BaseException:
            await self.stop()
            raise

    async def start(self) -> None:
        """Create the VM, load it, start its vCPUs."""
        self._require_new("start")
        await self._begin(self._boot)

    async def restore(self, plan: RestorePlan, *, shell: Shell | None = None, launch: Launch | None = None) -> None:
        """Create the VM as it was saved, its vCPUs' threads waiting. ``shell``: a VM made ahead to do it in; it is used
        up, whatever comes of it. ``launch``: the VM that is under way already, whose guest runs if that was opened; if
        this fails, it is still the caller's."""
        try:
            self._require_new("restore")
            await self._begin(lambda: self._restore(plan, shell, launch))
        finally:
            await close_shell(shell)

    async def _begin(self, build: Callable[[], Awaitable[None]]) -> None:
        self._notices = Notices(asyncio.get_running_loop(), self._hear)
        try:
            self._output.open()
            await build()
        except BaseException:
            await self.stop()
            raise

    async def _boot(self) -> None:
        building, devices = self._building, self._devices
        if devices is None:
            await run_in_thread(building.boot)
        else:  # they are the loop's, so it has its turn between a VM's creation and its start
            if not building.is_prepared:
                await self.prepare()
            await run_in_thread(building.create)
            if building.vm is not None and self._state == "new":
                with self._timeline.phase("device_fit"):
                    devices.fit(building.vm, self._device_failed)
                await run_in_thread(building.launch)
        self._started("running")

    async def _restore(self, plan: RestorePlan, shell: Shell | None, launch: Launch | None) -> None:
        if launch is not None and not await self._snapshots.adopt(plan, launch):
            launch = None
        if launch is None:
            await self._snapshots.restore(plan, shell, self._device_failed)
        self._started("running" if launch is not None and launch.opened else "paused")
        self._snapshots.mark(self._running_vm(), lambda: self._notices.post(FirstExit()), launch)
        if launch is not None:
            self._building.serve(launch)

    def _device_failed(self, error: Exception) -> None:
        """A device of ours went wrong: the guest cannot be served any more."""
        _log.error("a device of %s failed", self._plan.name, exc_info=error)
        self._halt(Stopped("machine", detail=f"device: {type(error).__name__}: {error}", t_ns=time.monotonic_ns()))

    async def write(self, port: Port, data: bytes) -> None:
        """Feed the port's receive backlog, waiting for the guest to make room."""
        await self._input.write(self._serial(port), data)

    async def pause(self) -> None:
        """Kick every vCPU out of the guest and keep it out, then hold the devices. Cancelled, the guest runs on."""
        vm = self._running_vm()
        try:
            for vcpu in vm.vcpus:
                vcpu.order("pause")
            late = await run_in_thread(lambda: _running_still(vm))
            if late is not None:
                raise MachineError("pause", expected=f"vCPU {late.index} out of the guest", found="still in it")
            if self._devices is not None:
                await self._devices.hold()
        except BaseException:
            if self._state == "running":
                self._let_run(vm)
            raise
        self._state = "paused" if self._state == "running" else self._state

    async def resume(self) -> None:
        """Let every vCPU enter the guest again, and the devices work."""
        vm = self._running_vm()
        self._snapshots.resuming()
        for vcpu in vm.vcpus:
            vcpu.tell_it_was_held()
        self._let_run(vm)
        self._state = "running" if self._state == "paused" else self._state
        self._snapshots.resumed()

    def _let_run(self, vm: KvmVm) -> None:
        if self._devices is not None:
            self._devices.unhold()
        for vcpu in vm.vcpus:
            vcpu.order("run")

    async def expect_save(self) -> None:
        """Get ready for one, so that nothing is left to do then but to save. Raises StateError, HostError."""
        await self._saver("running", "paused")

    async def precopy(self, memory: MemoryWriter) -> None:
        """By passes over what KVM's dirty log and our own marks say was written."""
        await (await self._saver("running", "paused")).precopy(memory)

    async def save(self, memory: MemoryWriter, *, difference_of: str | None = None) -> SavedMachine:
        """See Machine."""
        saver = await self._saver("paused")
        await self._output.told()  # what the guest has written is this VM's to tell, not its copies'
        self._require_one_of(("paused",))
        return await saver.save(memory, difference_of)

    def saved_as(self, name: str) -> None:
        """See Machine. Of a machine that was restored and not saved yet: the name of what it was restored from."""
        self._snapshots.saved_as(name)

    @property
    def is_running(self) -> bool:
        """Whether its vCPUs may run."""
        return self._state == "running"

    @property
    def restored(self) -> RestoreMarks | None:
        """Of a machine that was restored: when it reached what."""
        return self._snapshots.marks

    def on_first_exit(self, tell: Callable[[RestoreMarks], None]) -> None:
        """Have ``tell`` called on the loop when a restored guest has made its first exit. Before it is resumed."""
        self._snapshots.on_first_exit = tell

    async def working_set(self) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The runs of memory that are present, and those that this VM has written to; offsets as in a memory file."""
        from asyncvmm.machine.kvm.working_set import working_set

        return await (await self._saver("running", "paused", "ended")).look(working_set)

    def page_faults(self) -> Faults:
        """Page faults of the vCPUs' threads so far."""
        return self._snapshots.faults()

    async def request_shutdown(self) -> None:
        """Press the ACPI power button."""
        self._running_vm()
        assert self._board is not None
        self._board.press_power_button()

    async def stop(self) -> None:
        """Stop the vCPUs, join their threads, hand out what output is left, free everything."""
        self._state = "closed"
        self._building.give_up()
        self._input.wake_all()
        self._tracing.end()
        if self._freeing is None:
            self._freeing = asyncio.get_running_loop().create_task(self._free())
        await wait_out(self._freeing)
        self._freeing.result()

    async def _free(self) -> None:
        """A task of its own: every stop waits for it, and a cancelled one does not end it half-way."""
        await self._snapshots.aclose()
        vm = await in_thread_or_here(self._building.end_threads)
        self._output.close()
        if vm is not None:
            self._notices.drain()
            await self._output.finish()
            self._counting.keep()
            self._building.vm = None
        freed = self._devices is None or await self._devices.aclose()
        if vm is not None and freed:
            await in_thread_or_here(vm.close)

    async def evidence(self) -> Evidence:
        """Pause the guest and look at vCPU 0."""
        try:
            await self.pause()
            first = self._running_vm().vcpus[0]
            return Evidence(first.last_exit, first.regs().rip)
        except (StateError, MachineError, KvmIoctlError):
            return Evidence()

    def watch_port(self, port: int, value: int | None, told: Callable[[int], None]) -> Callable[[], None]:
        """See Machine."""
        self._running_vm()
        assert self._board is not None
        return self._port_watches.add(self._board.bus, port, value, told)

    def trace(self, trace: TraceSink) -> None:
        """Hand every exit from now on to ``trace``, on the loop; a former one ends. Tracing slows the guest."""
        self._tracing.begin(trace, self._running_vm().vcpus)
        if self._state == "ended":
            trace.end()

    @property
    def dropped_notices(self) -> int:
        """Notices that found the mailbox full: traced exits, for nothing else fills it."""
        return self._notices.dropped

    def untrace(self, trace: TraceSink) -> None:
        """End what ``trace`` began, unless another took over."""
        self._tracing.leave(trace, self._vm.vcpus if self._vm else ())

    # -- on the loop -----------------------------------------------------------------------------------------------

    def _started(self, state: Literal["running", "paused"]) -> None:
        """The guest runs, and may have ended already; or its vCPUs wait."""
        if self._state == "closed":
            raise StateError("start", expected="a machine that nobody stops meanwhile", state=self._state)
        if self._state == "new":
            self._state = state

    def _outlets(self) -> Outlets:
        return self._notices.outlets(self._set_irq_line, self._halt)

    def _set_irq_line(self, irq: int, level: bool) -> None:
        if (vm := self._building.vm) is not None:
            vm.set_irq_line(irq, level)

    def _hear(self, notice: Notice) -> None:
        if isinstance(notice, HasOutput):
            self._output.ready()
        elif isinstance(notice, HasRoom):
            self._input.wake(notice.port)
        elif isinstance(notice, TracedExit):
            self._tracing.hand(notice)
        elif isinstance(notice, PortWritten):
            self._port_watches.hand(notice)
        elif isinstance(notice, FirstExit):
            self._snapshots.first_exit()
        else:
            self._output.put([*self._output.take(), *self._end(notice)])

    def _end(self, stopped: Stopped) -> Sequence[Stopped]:
        """The first reason counts; who waits to write is woken to learn of it."""
        if self._state == "ended":
            return ()
        if self._state != "closed":
            self._state = "ended"
        self._input.wake_all()
        if self._devices is not None:
            self._devices.guest_ended()
        self._tracing.end()
        return (stopped,)

    def _serial(self, port: Port) -> SerialPort:
        self._running_vm()
        assert self._board is not None
        return self._board.console if port == "console" else self._board.control

    async def _saver(self, *states: _State) -> Saving:
        """For a machine in one of these, also when that is there."""
        self._require_one_of(states)
        saver = await self._snapshots.saver()
        self._require_one_of(states)
        return saver

    def _require_one_of(self, states: Sequence[_State]) -> None:
        self._running_vm()
        if self._state not in states:
            raise StateError("save", expected=f"a machine that is {' or '.join(states)}", state=self._state)

    def _require_new(self, what: str) -> None:
        if self._state != "new":
            raise StateError(what, expected="a new machine", state=self._state)

    def _running_vm(self) -> KvmVm:
        if self._vm is None or self._board is None or self._state in ("new", "closed"):
            raise StateError("machine", expected="a started machine", state=self._state)
        return self._vm

    # -- on vCPU threads -------------------------------------------------------------------------------------------

    def _halt(self, stopped: Stopped) -> None:
        """The guest is through: no vCPU enters it again."""
        vm = self._vm
        if vm is not None:
            for vcpu in vm.vcpus:
                vcpu.order("stop")
        self._notices.post(stopped)


def _running_still(vm: KvmVm) -> Vcpu | None:
    """A vCPU that did not leave the guest in time. Blocks until they all have."""
    return next((vcpu for vcpu in vm.vcpus if not vcpu.wait_parked(_PARK_TIMEOUT_S)), None)
