"""Taking a snapshot of a VM: wait for what it is to wait for, hold the vCPUs, save, let them go, tell of it.

The directory is there, aside, before anything is waited for: what can be refused is refused at once, and nothing stands
between a trigger and the pause. Whatever fails, and whoever is cancelled, the VM runs on as it was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import attrs

from asyncvmm import __version__
from asyncvmm.errors import StateError, TriggerImpossible
from asyncvmm.events.snapshot_types import SnapshotFailedEvent, SnapshotSaved, SnapshotTrigger
from asyncvmm.machine.base import BootPlan, Machine
from asyncvmm.machine.saved import SavedMachine
from asyncvmm.machine.waiting import in_thread, in_thread_or_here, wait_out
from asyncvmm.snapshot.bases import Bases
from asyncvmm.snapshot.config_record import to_plain
from asyncvmm.snapshot.directory import SnapshotDirectory, base_of
from asyncvmm.snapshot.guest_record import SECTION, GuestRecord, record_of
from asyncvmm.snapshot.manifest import Manifest
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.snapshot.order import SnapshotOrder
from asyncvmm.snapshot.savable import check_savable
from asyncvmm.snapshot.snapshot import OWN_PREFIX, Snapshot
from asyncvmm.snapshot.triggers import Fired
from asyncvmm.snapshot.watcher import wait_for_trigger

if TYPE_CHECKING:
    from asyncvmm.device_config import NetConfig
    from asyncvmm.vm import VM

NOW = Fired("now", "asked for at once")


@attrs.define
class _Times:
    """Of one snapshot, ns since the VM's start."""

    trigger_ns: int
    paused_ns: int = 0
    resumed_ns: int = 0


@attrs.frozen
class _Held:
    """What was saved while the vCPUs were held."""

    machine: SavedMachine
    guest: GuestRecord


class SnapshotTaker:
    """Takes the snapshots of one VM, one at a time; any number may be waited for."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._bases = Bases(vm)

    async def take(self, order: SnapshotOrder) -> Snapshot:
        """Carry the order out, but for ``then="stop"``: the VM stays held for that.

        Raises StateError, ConfigError, SnapshotFailed, TriggerImpossible, MachineError.
        """
        came: list[Fired] = []
        try:
            return await self._take(order, came)
        except BaseException as error:
            self._tell_failed(error, order, came)
            raise

    async def _take(self, order: SnapshotOrder, came: list[Fired]) -> Snapshot:
        """``came`` gets what has come."""
        self._check(order)
        let_run = self._was_let_run()
        async with self._draft(order) as draft:
            begin_ns = self._now()
            fired = await self._fired(order, let_run)
            came.append(fired)
            # A trigger that came before anybody waited for it counts from then on.
            times = _Times(self._now() if fired.t_ns is None else max(fired.t_ns, begin_ns))
            self._tell_trigger(fired, order, times)
            await anyio.sleep(order.quiesce_ms / 1000)
            with self._alone():
                snapshot = await self._save(draft, order, fired, times)
        if order.directory is None:
            snapshot.remove_when_closed()
        self._tell_saved(snapshot, fired, times)
        return snapshot

    # -- before ----------------------------------------------------------------------------------------------------

    def _check(self, order: SnapshotOrder) -> None:
        vm = self._vm
        allowed = ("ready", "paused") if order.when is None else ("new", "starting", "booting", "ready", "paused")
        if vm.state not in allowed:
            raise StateError("snapshot", expected=f"a VM that is {' or '.join(allowed)}", state=vm.state)
        check_savable(vm.config, vm.accel or vm.config.accel)
        self._bases.check(order)
        if order.needs_pre_exec and self._was_let_run():
            expected, found = "a workload that is yet to run (ask before boot)", "one that was let run"
            raise TriggerImpossible("snapshot at pre-exec", expected=expected, found=found)

    def _was_let_run(self) -> bool:
        """Whether it is too late to hold the workload before its exec."""
        vm = self._vm
        if vm._hold.is_on:
            return False
        # One that is about to run is not held either, if PID 1 was told of no window as it was begun.
        is_begun = vm._attempt is not None and bool(vm.config.workload)
        return vm.events.pre_exec.value is not None or is_begun

    @asynccontextmanager
    async def _draft(self, order: SnapshotOrder) -> AsyncIterator[SnapshotDirectory]:
        """The directory to be, gone again if it does not come to be one."""
        path, holder = order.directory, None
        if path is None:
            holder = await in_thread(_own_directory, _remove)
            path = holder / "snapshot"
        try:
            draft = await in_thread(lambda: SnapshotDirectory.create(path), SnapshotDirectory.abort)
            try:
                yield draft
            except BaseException:
                await in_thread_or_here(draft.abort)
                raise
        except BaseException:
            if holder is not None:
                await in_thread_or_here(lambda: _remove(holder))
            raise

    async def _fired(self, order: SnapshotOrder, let_run: bool) -> Fired:
        vm = self._vm
        if order.when is None:
            return NOW
        await vm.events.ready
        while vm.state == "starting":  # what starts the machine is yet to return
            await anyio.lowlevel.checkpoint()
        machine = self._machine()
        check_savable(vm.config, machine.accel)  # it may have been yet to be chosen
        try:
            await machine.expect_save()
        except StateError:
            if not vm.events.stopped.done:  # else it has ended since it was asked, and nothing comes of it any more
                raise
        fired = await wait_for_trigger(
            order.when, vm.events, vm.console, machine.activity, let_run=let_run, watch_port=machine.watch_port
        )
        while vm.state == "booting":  # READY has come, boot() has its turn in one of the loop's next
            await anyio.lowlevel.checkpoint()
        return fired

    def _machine(self) -> Machine:
        machine = self._vm._attempt.machine if self._vm._attempt else None
        if machine is None:
            raise StateError("snapshot", expected="a started VM", state=self._vm.state)
        return machine

    def _plan(self) -> BootPlan:
        plan = self._vm._attempt.made_plan if self._vm._attempt else None
        assert plan is not None
        return plan

    def _now(self) -> int:
        return self._vm.timeline.clock() - self._vm.timeline.start_ns

    # -- with the vCPUs held ---------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises StateError if another snapshot is being saved, or there is nothing to be saved."""
        vm = self._vm
        if vm._being_saved or vm.state not in ("ready", "paused"):
            found = "another one being saved" if vm._being_saved else None
            raise StateError("snapshot", expected="a running or paused VM", found=found, state=vm.state)
        vm._being_saved = True
        try:
            yield
        finally:
            vm._being_saved = False

    async def _save(self, draft: SnapshotDirectory, order: SnapshotOrder, fired: Fired, times: _Times) -> Snapshot:
        self._bases.check(order)  # another may have been taken meanwhile
        machine, base = self._machine(), order.base
        writer = MemoryWriter(draft.memory_fd, self._vm.config.memory_mib << 20, is_difference=base is not None)
        if order.precopy:
            await machine.precopy(writer)
        async with self._held(order, times):
            saved = await self._save_machine(machine, writer, base.id if base else None)
            held = _Held(saved, self._record())
            disks = await self._save_drives(draft)
            if order.then == "stop":
                return await self._commit(draft, order, fired, held, disks)
        return await self._commit(draft, order, fired, held, disks)

    @asynccontextmanager
    async def _held(self, order: SnapshotOrder, times: _Times) -> AsyncIterator[None]:
        """No vCPU runs in the block. Afterwards they do as before, unless the VM is to stop and all went well."""
        vm = self._vm
        was_running = vm.state == "ready"
        keep = False
        try:
            if was_running:
                await vm.pause()
            times.paused_ns = self._now()
            yield
            keep = order.then == "stop"
        finally:
            if was_running and not keep and vm.state == "paused":
                await vm._let_run()
            times.resumed_ns = self._now()

    async def _save_machine(self, machine: Machine, writer: MemoryWriter, base: str | None) -> SavedMachine:
        """To its end, also if cancelled: the machine must stand still for it."""
        latencies, begin = self._vm.metrics.groups.latencies_us, self._now()
        task = asyncio.get_running_loop().create_task(machine.save(writer, difference_of=base))
        await wait_out(task)
        name = "vmm_full_create_snapshot" if base is None else "vmm_diff_create_snapshot"
        setattr(latencies, name, (self._now() - begin) // 1000)
        return task.result()

    def _record(self) -> GuestRecord:
        vm = self._vm
        return record_of(vm._watch, vm.events, holds_workload=vm._hold.is_on)

    # -- on disk ---------------------------------------------------------------------------------------------------

    async def _save_drives(self, draft: SnapshotDirectory) -> list[Any]:
        plan = self._plan()
        if not plan.resources.drives:
            return []
        from asyncvmm.storage.snapshot import save_drives

        return await save_drives(plan.resources, _Files(draft))

    async def _commit(
        self, draft: SnapshotDirectory, order: SnapshotOrder, fired: Fired, held: _Held, disks: list[Any]
    ) -> Snapshot:
        """To its end, also if cancelled; then it is taken back. Whatever fails, the machine's next difference is still
        one of ``base``."""
        manifest = self._manifest(draft, order, fired, held, disks)
        sections = {**held.machine.sections, SECTION: held.guest.to_section()}

        def commit() -> Snapshot:
            draft.commit(manifest, sections)
            try:
                return Snapshot.open(draft.path)
            except BaseException:
                _remove(draft.path)
                raise

        snapshot = await in_thread(commit, _take_back)
        self._machine().saved_as(snapshot.id)
        self._bases.saved_to(snapshot)
        return snapshot

    def _manifest(
        self, draft: SnapshotDirectory, order: SnapshotOrder, fired: Fired, held: _Held, disks: list[Any]
    ) -> Manifest:
        saved, base, plan, where = held.machine, order.base, self._plan(), draft.path
        # The devices as they are: an image's root is one of them, a network card has got its address by now.
        config = attrs.evolve(self._vm.config, drives=plan.devices.drives, net=_with_mac(plan))
        return Manifest(
            id=draft.id,
            machine=saved.accel,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            asyncvmm=__version__,
            memory_mib=config.memory_mib,
            vcpus=saved.vcpus,
            regions=saved.regions,
            memory=saved.memory,
            cpu=saved.cpu,
            devices=tuple(plan.devices.names),
            config=to_plain(config),
            window=held.guest.in_window,
            base=None if base is None else base_of(base.id, base.path, where),
            extra={
                "trigger": {"trigger": fired.trigger, "detail": fired.detail, "quiesce_ms": order.quiesce_ms},
                "plan": {
                    "kernel": str(plan.kernel),
                    "initrd": None if plan.initrd is None else str(plan.initrd),
                    "cmdline": plan.cmdline,
                    "tsc_khz": plan.tsc_khz,
                },
                "disks": disks,
            },
        )

    # -- telling ---------------------------------------------------------------------------------------------------

    def _tell_trigger(self, fired: Fired, order: SnapshotOrder, times: _Times) -> None:
        events = self._vm.events
        if events.listening:
            events.publish(SnapshotTrigger(times.trigger_ns, fired.trigger, fired.detail, order.quiesce_ms))

    def _tell_failed(self, error: BaseException, order: SnapshotOrder, came: list[Fired]) -> None:
        events, path = self._vm.events, order.directory
        if events.listening:
            trigger, where = came[0].trigger if came else None, None if path is None else str(path)
            reason = None
            if isinstance(error, asyncio.CancelledError):
                ended = self._vm._activities.ended
                reason = "the VM was stopped" if ended else "whoever asked for it was cancelled"
            events.publish(SnapshotFailedEvent.of(self._now(), error, trigger, where, reason))

    def _tell_saved(self, snapshot: Snapshot, fired: Fired, times: _Times) -> None:
        vm, manifest, now_ns = self._vm, snapshot.manifest, self._now()
        latencies = vm.metrics.groups.latencies_us
        name = "full_create_snapshot" if manifest.base is None else "diff_create_snapshot"
        setattr(latencies, name, (now_ns - times.trigger_ns) // 1000)
        if vm.events.listening:
            vm.events.publish(
                SnapshotSaved(
                    now_ns,
                    snapshot=manifest.id,
                    path=str(snapshot.path),
                    trigger=fired.trigger,
                    trigger_ns=times.trigger_ns,
                    paused_ns=times.paused_ns,
                    saved_ns=now_ns,
                    pause_duration_ns=times.resumed_ns - times.paused_ns,
                    save_duration_ns=now_ns - times.trigger_ns,
                    logical_bytes=manifest.logical_bytes,
                    allocated_bytes=manifest.allocated_bytes,
                    difference=manifest.base is not None,
                )
            )


@attrs.frozen
class _Files:
    """The directory as the drives' copies need it."""

    draft: SnapshotDirectory

    def create(self, name: str) -> int:
        """A new file in it; the descriptor is the caller's."""
        return os.dup(self.draft.new_file(name))


def _with_mac(plan: BootPlan) -> NetConfig | None:
    net = plan.devices.net
    return None if net is None else attrs.evolve(net, mac=plan.resources.mac or net.mac)


def _own_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix=OWN_PREFIX))


def _take_back(snapshot: Snapshot) -> None:
    snapshot.close()
    _remove(snapshot.path)


def _remove(directory: Path) -> None:
    """One that was made here a moment ago."""
    shutil.rmtree(directory, ignore_errors=True)
