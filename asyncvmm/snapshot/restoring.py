"""Restoring: a new VM becomes the one that a snapshot holds. What happens, in order, each step an event.

mapped: memory and state are in place, the vCPUs held. Entropy and clock: the control line is told ``go``. Then the
vCPUs run; the first exit and the first sign of the guest are told as they come, however long after.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from asyncvmm.config import VMConfig
from asyncvmm.effects import Effect, SerialOutput
from asyncvmm.errors import ConfigError, GuestStopped
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.snapshot_types import RestoreFirstGuestEvent, RestoreMapped, RestoreStep
from asyncvmm.machine.base import EffectSink, Machine
from asyncvmm.snapshot.attempt import RestoreAttempt, choose_machine
from asyncvmm.snapshot.config_record import from_plain
from asyncvmm.snapshot.handshake import Answer, go_lines
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.watch import GuestWatch

if TYPE_CHECKING:
    from asyncvmm.snapshot.shell_pool import ShellPool
    from asyncvmm.vm import VM

Configure = Callable[[VMConfig], VMConfig]


@attrs.frozen(kw_only=True)
class RestoreOptions:
    """How to restore. prefetch: make the working set present ahead, where it is known. track_dirty: differences are to
    be saved of it. paused: leave its vCPUs held. shells: take a VM that was made ahead from there."""

    prefetch: bool = True
    track_dirty: bool = False
    paused: bool = False
    shells: ShellPool | None = None


def saved_config(snapshot: Snapshot, name: str | None, configure: Configure | None) -> VMConfig:
    """The saved VM's configuration, with another name, and as ``configure`` wants it.

    Raises SnapshotDamaged, and ConfigError for a change that the saved machine cannot take.
    """
    saved = attrs.evolve(from_plain(snapshot.manifest.config), name=name)
    # A copy kept by name was the saved VM's; each clone has one of its own, which dies with it.
    drives = tuple(attrs.evolve(drive, overlay=drive.overlay is not False) for drive in saved.drives)
    saved = attrs.evolve(saved, drives=drives)
    config = saved if configure is None else configure(saved)
    for what in ("memory_mib", "vcpus", "acpi"):
        if getattr(config, what) != getattr(saved, what):
            raise ConfigError(f"restored {what}", expected=getattr(saved, what), found=getattr(config, what))
    if config.devices.names != saved.devices.names:
        raise ConfigError("restored devices", expected=saved.devices.names, found=config.devices.names)
    return config


class Restoring:
    """One restore, as ``vm`` undergoes it. ``begin_ns``: when it was called for."""

    def __init__(self, vm: VM, snapshot: Snapshot, options: RestoreOptions, begin_ns: int) -> None:
        self.snapshot = snapshot
        self.options = options
        self._vm = vm
        self._begin_ns = begin_ns
        self._faults = _faults()
        self._running = False
        self._heard = False

    async def attempt(self, config: VMConfig, name: str) -> RestoreAttempt:
        """What makes the machine. Raises KvmUnavailable, QemuUnavailable, SnapshotDamaged."""
        choice, timeline = await choose_machine(self.snapshot), self._vm.timeline
        attempt = RestoreAttempt(self.snapshot, config, name, choice, timeline, self.options.track_dirty)
        await attempt.plan()
        return attempt

    def sink(self, watch: GuestWatch) -> EffectSink:
        """Have ``watch`` follow the guest where it was saved; gives what the machine is to hand its effects to."""
        guest = self.snapshot.guest
        contract = GuestContract.of_saved(has_pid1=guest.has_pid1, started=guest.started, stages=guest.stages)
        if guest.exited:
            self._vm.events.exit.fail(GuestStopped("the workload had ended before the snapshot", reason="exited"))
        watch.go_on(contract, {"console": guest.console_line, "control": guest.control_line})

        def take(effects: Sequence[Effect]) -> None:
            if not self._heard and self._running:
                self._tell_first(effects)
            watch.take(effects)

        return take

    async def carry_out(self, machine: Machine) -> None:
        """Become the saved machine, its vCPUs held, and leave word for PID 1.

        Raises SnapshotMismatch, SnapshotDamaged, HostError, MachineError.
        """
        vm, options = self._vm, self.options
        plan = self.snapshot.restore_plan(prefetch=options.prefetch, track_dirty=options.track_dirty)
        begin = vm.timeline.clock()
        await machine.restore(plan)
        vm.metrics.groups.latencies_us.vmm_load_snapshot = (vm.timeline.clock() - begin) // 1000
        if vm.events.listening:
            vm.events.publish(RestoreMapped(self._now(), self._since_call(), self.snapshot.id))

    async def let_run(self, machine: Machine, resume: Callable[[], Awaitable[None]]) -> None:
        """Have the guest go on, and PID 1 told what makes it another one than all others: fresh entropy, the time.

        Before it runs, if the time holds whenever it is read; with ``paused`` somebody else resumes it.
        """
        greets, begin_ns = self.snapshot.guest.has_pid1, self._vm.timeline.clock()
        answer = Answer(self._vm.events) if greets else None
        early = self.options.paused or machine.guest_time() is not None
        try:
            self._running = True
            if answer and early:
                await machine.write("control", go_lines(machine))
            if self.options.paused:
                return
            await resume()
            if answer and not early:
                await machine.write("control", go_lines(machine))
            if answer and await answer.wait():
                self._step("entropy", begin_ns)
                self._step("clock", begin_ns)
        finally:
            if answer:
                answer.close()

    def _tell_first(self, effects: Sequence[Effect]) -> None:
        self._heard = True
        vm = self._vm
        if vm.events.listening:
            kind = "serial" if isinstance(effects[0], SerialOutput) else "guest.end"
            minor, major = (now - then for now, then in zip(_faults(), self._faults, strict=True))
            vm.events.publish(RestoreFirstGuestEvent(self._now(), self._since_call(), kind, minor, major))

    def _step(self, step: str, begin_ns: int) -> None:
        if self._vm.events.listening:
            self._vm.events.publish(RestoreStep(self._now(), step, self._vm.timeline.clock() - begin_ns))

    def _now(self) -> int:
        return self._vm.timeline.clock() - self._vm.timeline.start_ns

    def _since_call(self) -> int:
        return self._vm.timeline.clock() - self._begin_ns


async def restored(
    kind: type[VM],
    snapshot: Snapshot | str | Path,
    options: RestoreOptions,
    *,
    name: str | None,
    prepare: Callable[[VM], None] | None,
    configure: Configure | None,
) -> VM:
    """VM.restore."""
    begin_ns = time.monotonic_ns()
    if not isinstance(snapshot, Snapshot):
        async with await Snapshot.load(snapshot) as opened:
            return await _restored(kind, opened, options, begin_ns, name, prepare, configure)
    return await _restored(kind, snapshot, options, begin_ns, name, prepare, configure)


async def _restored(
    kind: type[VM],
    snapshot: Snapshot,
    options: RestoreOptions,
    begin_ns: int,
    name: str | None,
    prepare: Callable[[VM], None] | None,
    configure: Configure | None,
) -> VM:
    vm = kind(saved_config(snapshot, name, configure))
    try:
        if prepare is not None:
            prepare(vm)
        await vm._become(Restoring(vm, snapshot, options, begin_ns))
    except BaseException:
        await vm.stop()
        raise
    return vm


def _faults() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt
