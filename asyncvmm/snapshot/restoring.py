"""Restoring: a new VM becomes the one that a snapshot holds. What happens, in order, each step an event.

mapped: memory and state are in place, the vCPUs held. Entropy and clock: the control line is told ``go``. Then the
vCPUs run; the first exit and the first sign of the guest are told as they come, however long after.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import attrs

from asyncvmm.config import VMConfig
from asyncvmm.effects import Effect, SerialOutput
from asyncvmm.errors import AsyncVMMError, ConfigError, GuestStopped, StateError
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.snapshot_types import RestoreFirstExit, RestoreFirstGuestEvent, RestoreMapped, RestoreStep
from asyncvmm.events.types import GuestReady
from asyncvmm.machine.base import EffectSink, Machine
from asyncvmm.machine.waiting import wait_out
from asyncvmm.snapshot.attempt import RestoreAttempt, choose_machine
from asyncvmm.snapshot.handshake import Answer, go_lines
from asyncvmm.snapshot.hooks import call_plain, check_hook
from asyncvmm.snapshot.launching import Preparation, RestoreOptions, Wanted, begin, enters_ahead
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.snapshot.working_set import WorkingSet
from asyncvmm.watch import GuestWatch
from asyncvmm.workload_hold import WorkloadHold

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.launch import Launch
    from asyncvmm.machine.kvm.machine import KvmMachine
    from asyncvmm.machine.kvm.marks import RestoreMarks
    from asyncvmm.vm import VM

_log = logging.getLogger("asyncvmm.snapshot")

Configure = Callable[[VMConfig], VMConfig]


def saved_config(snapshot: Snapshot, name: str | None, configure: Configure | None, track_dirty: bool) -> VMConfig:
    """The saved VM's configuration, with another name, and as ``configure`` wants it.

    Raises SnapshotDamaged, and ConfigError for a change that the saved machine cannot take.
    """
    saved = snapshot.tracking_config if track_dirty else snapshot.config
    if name is not None:
        saved = attrs.evolve(saved, name=name)
    if configure is None:
        return saved
    config = call_plain("configure", configure, saved)
    if not isinstance(config, VMConfig):
        raise ConfigError("configure", expected="a VMConfig", found=repr(config)[:80])
    if config.accel not in (saved.accel, "auto", snapshot.manifest.machine):
        raise ConfigError("restored accel", expected=snapshot.manifest.machine, found=config.accel)
    for what in ("memory_mib", "vcpus", "acpi", "workload", "env"):
        if getattr(config, what) != getattr(saved, what):
            raise ConfigError(f"restored {what}", expected=getattr(saved, what), found=getattr(config, what))
    if config.track_dirty is not track_dirty:
        expected = f"VM.restore(track_dirty={config.track_dirty}) to be asked for it"
        raise ConfigError("restored track_dirty", expected=expected, found=f"configure= giving {config.track_dirty}")
    if config.devices.names != saved.devices.names:
        raise ConfigError("restored devices", expected=saved.devices.names, found=config.devices.names)
    return config


class Restoring:
    """One restore, as ``vm`` undergoes it. ``begin_ns``: when it was called for. ``launch``: where it is under way."""

    def __init__(
        self, vm: VM, snapshot: Snapshot, options: RestoreOptions, begin_ns: int, launch: Launch | None = None
    ) -> None:
        self.snapshot = snapshot
        self.options = options
        self.begin_ns = begin_ns
        self._vm = vm
        self._launch = launch
        self._preparing: Preparation | None = None
        self._running = self._is_untold = False
        self._heard = False
        self._told = False
        self._kvm: KvmMachine | None = None
        self._looking: asyncio.Task[None] | None = None

    async def attempt(self, config: VMConfig, name: str) -> RestoreAttempt:
        """What makes the machine. Raises KvmUnavailable, QemuUnavailable, SnapshotDamaged."""
        choice, timeline = await choose_machine(self.snapshot), self._vm.timeline
        attempt = RestoreAttempt(self.snapshot, config, name, choice, timeline, self.options.track_dirty)
        await attempt.plan()
        return attempt

    def sink(self, watch: GuestWatch) -> EffectSink:
        """Have ``watch`` follow the guest where it was saved; gives what the machine is to hand its effects to."""
        guest = self.snapshot.guest
        contract = GuestContract.of_saved(
            has_pid1=guest.has_pid1, started=guest.started, stages=guest.stages, answers_go=guest.answers_go
        )
        if guest.exited:
            self._vm.events.exit.fail(GuestStopped("the workload had ended before the snapshot", reason="exited"))
        self._vm.events.ready.set(GuestReady(0))  # it was, before the VM that is told of it began
        for event in guest.past():
            self._vm.events.recall(event)
        watch.go_on(contract, {"console": guest.console_line, "control": guest.control_line})

        def take(effects: Sequence[Effect]) -> None:
            if effects and not self._heard and self._running:
                self._tell_first(effects)
            watch.take(effects)

        return take

    async def carry_out(self, machine: Machine) -> None:
        """Become the saved machine, its vCPUs held.

        Raises SnapshotMismatch, SnapshotDamaged, HostError, MachineError.
        """
        vm, begin_ns = self._vm, self._vm.timeline.clock()
        await self._restore(machine)
        vm.metrics.groups.latencies_us.vmm_load_snapshot = (vm.timeline.clock() - begin_ns) // 1000
        if self.options.track_dirty:
            machine.saved_as(self.snapshot.id)
        if vm.events.listening:
            marks = None if self._kvm is None else self._kvm.restored
            mapped_ns = vm.timeline.clock() if marks is None else marks.mapped_ns
            since_start, since_call = mapped_ns - vm.timeline.start_ns, mapped_ns - self.begin_ns
            vm.events.publish(RestoreMapped(since_start, since_call, self.snapshot.id))

    async def _restore(self, machine: Machine) -> None:
        options = self.options
        plan = options.plan(self.snapshot)
        if machine.accel == "qemu":
            await machine.restore(plan)
            return
        kvm = self._kvm = cast("KvmMachine", machine)
        kvm.on_first_exit(self._tell_first_exit)
        if self._launch is not None:
            await kvm.restore(plan, launch=self._launch)
        else:
            await kvm.restore(plan, shell=None if options.shells is None else await options.shells.take(plan))
        self._preparing = Preparation(self.snapshot, options)

    async def let_run(self, machine: Machine, resume: Callable[[], Awaitable[None]]) -> None:
        """Have the guest go on, and PID 1 told what makes it another one than all others: fresh entropy, the time.

        Before it runs, if the time holds whenever it is read; with ``paused`` somebody else resumes it.
        """
        guest, begin_ns = self.snapshot.guest, self._vm.timeline.clock()
        self._running = True
        if self.options.paused:
            self._is_untold = guest.has_pid1
            self._vm._hold = WorkloadHold(is_configured=True, is_on=guest.in_window)  # if it is saved before it has run
            return
        answer = Answer(self._vm.events, expected=guest.answers_go) if guest.has_pid1 else None
        early = machine.guest_time() is not None
        try:
            if answer and early:
                await machine.write("control", go_lines(machine))
            try:
                await self._let_go(resume)
            except StateError:
                if not self._vm.events.stopped.done:
                    raise
                return  # it has ended by itself already: its events tell how
            if answer and not early:
                await machine.write("control", go_lines(machine))
            if answer:
                await self._hear(answer, begin_ns)
            if self._kvm is None:
                self._tell_profile()
        finally:
            if answer:
                answer.close()

    async def tell_untold(self, machine: Machine) -> None:
        """A VM that was left paused is about to run: what ``let_run`` tells PID 1 it is told now. A snapshot of it that
        was taken before has nothing of that, which all clones would read."""
        if self._is_untold:
            await machine.write("control", go_lines(machine))
            self._is_untold = self._vm._hold.is_on = False

    async def _hear(self, answer: Answer, begin_ns: int) -> None:
        """Wait for PID 1's answer, unless another VM of the snapshot has shown that there will be none."""
        answered = not self.snapshot.unanswering and await answer.wait()
        self.snapshot.unanswering |= answer.refused
        for step in ("entropy", "clock") if answered else ("unanswered",):
            self._step(step, begin_ns)

    async def _let_go(self, resume: Callable[[], Awaitable[None]]) -> None:
        if self._kvm is None or not self._kvm.is_running:
            await resume()
        elif self._vm.state == "paused":  # it was let go ahead
            self._vm._go("ready")

    def _tell_first_exit(self, marks: RestoreMarks) -> None:
        vm = self._vm
        if marks.first_exit_ns is not None and vm.events.listening:
            duration_ns = marks.first_exit_ns - self.begin_ns
            vm.events.publish(RestoreFirstExit(marks.first_exit_ns - vm.timeline.start_ns, duration_ns))
        self._tell_profile()

    def _tell_first(self, effects: Sequence[Effect]) -> None:
        self._heard = True
        vm, kvm = self._vm, self._kvm
        if vm.events.listening:
            kind = "serial" if isinstance(effects[0], SerialOutput) else "guest.end"
            faults = None if kvm is None else kvm.page_faults()
            minor, major = (None, None) if faults is None else (faults.minor, faults.major)
            now_ns = vm.timeline.clock()
            since_start, since_call = now_ns - vm.timeline.start_ns, now_ns - self.begin_ns
            vm.events.publish(RestoreFirstGuestEvent(since_start, since_call, kind, minor, major))
        if kvm is not None and not self.snapshot.working_set and isinstance(effects[0], SerialOutput):
            self._looking = asyncio.get_running_loop().create_task(self._find_working_set(kvm))

    async def _find_working_set(self, kvm: KvmMachine) -> None:
        """What it has needed up to here, later ones need as well."""
        try:
            touched, written = await kvm.working_set()
            await self.snapshot.keep_working_set(WorkingSet(touched, written))
            if self._preparing is not None:
                await self._preparing.renew()
        except AsyncVMMError as error:  # the guest ended meanwhile
            _log.debug("no working set of %s: %s", self.snapshot.path, error)

    def _tell_profile(self) -> None:
        if not self._told:
            self._told = True
            self._vm._report.tell_restored(into_shell=self.options.shells is not None)

    async def aclose(self) -> None:
        """The VM ends: tell what was not told yet."""
        self._tell_profile()
        if self._preparing is not None:
            await self._preparing.aclose()
        if self._looking is not None:
            await wait_out(self._looking)

    def _step(self, step: str, begin_ns: int) -> None:
        if self._vm.events.listening:
            self._vm.events.publish(RestoreStep(self._now(), step, self._vm.timeline.clock() - begin_ns))

    def _now(self) -> int:
        return self._vm.timeline.clock() - self._vm.timeline.start_ns


async def restored(
    kind: type[VM],
    snapshot: Snapshot | str | Path,
    wanted: Wanted,
    begin_ns: int,
    *,
    name: str | None,
    prepare: Callable[[VM], None] | None,
    configure: Configure | None,
) -> VM:
    """VM.restore, called at ``begin_ns``.

    The launch comes as early as can be, in few calls: each costs a microsecond or several there.
    """
    if isinstance(snapshot, Snapshot):
        opened, let_go = snapshot, snapshot.end_use
        opened.begin_use()
    else:
        opened = await Snapshot.load(snapshot)
        let_go = opened.aclose
    launch: Launch | None = None
    vm: VM | None = None
    try:
        try:
            if prepare is not None or configure is not None:
                check_hook("prepare", prepare)
                check_hook("configure", configure)
            launch = begin(opened, wanted, at_once=prepare is None)
            vm = await _restored(kind, opened, RestoreOptions(*wanted), launch, begin_ns, name, prepare, configure)
        finally:
            await _let_go(launch, let_go)
    except BaseException:
        if vm is not None:  # nobody will get it
            await vm.stop()
        raise
    return vm


async def _let_go(launch: Launch | None, let_go: Callable[[], Awaitable[None]]) -> None:
    try:
        if launch is not None:
            await launch.aclose()
    finally:
        await let_go()


async def _restored(
    kind: type[VM],
    snapshot: Snapshot,
    options: RestoreOptions,
    launch: Launch | None,
    begin_ns: int,
    name: str | None,
    prepare: Callable[[VM], None] | None,
    configure: Configure | None,
) -> VM:
    if launch is not None:
        await launch.go_first()
    snapshot.loaded.check_sizes()
    vm = kind(saved_config(snapshot, name, configure, options.track_dirty))
    try:
        vm.timeline.start_ns = begin_ns  # its time began with the call
        if prepare is not None:
            call_plain("prepare", prepare, vm)
            if launch is not None:
                launch.decide(enters_ahead(snapshot, options.paused))
        await vm._become(Restoring(vm, snapshot, options, begin_ns, launch))
    except BaseException:
        await vm.stop()
        raise
    return vm
