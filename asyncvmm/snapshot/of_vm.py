"""What a VM can be asked about snapshots: the calls of VM that need nothing of this until somebody makes them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import attrs

from asyncvmm.activities import Activities
from asyncvmm.attempt import Attempt
from asyncvmm.config import VMConfig
from asyncvmm.errors import MachineError, StateError
from asyncvmm.events.hub import EventHub
from asyncvmm.home_loop import HomeLoop
from asyncvmm.watch import GuestWatch
from asyncvmm.workload_hold import WorkloadHold

if TYPE_CHECKING:
    from asyncvmm.snapshot.order import SnapshotOrder, Then
    from asyncvmm.snapshot.predicate import Predicate
    from asyncvmm.snapshot.resources import SnapshotResources
    from asyncvmm.snapshot.restoring import Restoring
    from asyncvmm.snapshot.shell_pool import ShellPool
    from asyncvmm.snapshot.snapshot import Snapshot
    from asyncvmm.snapshot.taking import SnapshotTaker
    from asyncvmm.vm import VM


@cache
def _restoring() -> ModuleType:
    """What restores, imported when it is first wanted; to look that up each time takes as long as a system call."""
    from asyncvmm.snapshot import restoring

    return restoring


class SnapshotCalls(ABC):
    """The part of VM that takes snapshots and is made of them."""

    config: VMConfig
    _home: HomeLoop
    _attempt: Attempt | None
    _watch: GuestWatch
    _activities: Activities
    events: EventHub
    _hold: WorkloadHold
    _going: asyncio.Task[None] | None
    _being_saved: bool
    _restoring: Restoring | None
    _clone: int | None = None
    """Its number among the clones that it is one of."""

    @property
    @abstractmethod
    def state(self) -> str:
        """Where the VM is in its life."""

    @abstractmethod
    async def stop(self) -> None:
        """End the guest."""

    @abstractmethod
    async def pause(self) -> None:
        """Stop every vCPU."""

    @abstractmethod
    async def _let_run(self) -> None:
        """Let the vCPUs run on."""

    async def snapshot(
        self,
        when: SnapshotResources | Predicate | None = None,
        *,
        out: str | Path | None = None,
        base: Snapshot | None = None,
        precopy: bool = False,
        then: Then = "resume",
    ) -> Snapshot:
        """Save the VM, at once or when ``when`` says so, and let it run on or stop it.

        out: the directory to be made; None takes what ``when`` says, else one that goes when the Snapshot is closed.
        base: save only what changed since that snapshot of this VM, which has ``track_dirty`` (KVM alone). precopy:
        copy memory while the guest runs, so that it stands still for less time. then: ``resume`` or ``stop``. A call
        that waits for the workload's exec, made before boot() or in a task that was begun before it, has PID 1 hold the
        workload; it is let go afterwards, also if something else came first, or nothing was saved.

        Raises ConfigError, StateError, SnapshotFailed, TriggerImpossible, MachineError. Cancelled or failed, it leaves
        the VM as it was, and no snapshot; but with ``stop``, what is saved stays once the VM is being stopped.
        """
        from asyncvmm.snapshot.order import SnapshotOrder

        self._home.claim("snapshot")
        order = SnapshotOrder(when=when, out=out, base=base, precopy=precopy, then=then)
        with self._workload_held(order), self._activities.begin("snapshot"):
            snapshot = await self._snapshots.take(order)
            if order.wants_pre_exec and snapshot.guest.in_window:
                self._hold.is_configured = False  # it has served its purpose
        if then == "stop":
            await self.stop()
        return snapshot

    @classmethod
    async def restore(
        cls,
        snapshot: Snapshot | str | Path,
        *,
        name: str | None = None,
        prepare: Callable[[VM], None] | None = None,
        configure: Callable[[VMConfig], VMConfig] | None = None,
        prefetch: bool = True,
        track_dirty: bool = False,
        paused: bool = False,
        shells: ShellPool | None = None,
    ) -> VM:
        """A new VM that goes on where ``snapshot`` was taken, with entropy of its own and the right time.

        name: its name in events. prepare: is called with the new VM before anything is done with it: what it attaches
        misses no event and no byte. configure: is given the saved
        VM's configuration and gives the new one's: other paths, sockets and host ports, but the same devices. prefetch:
        make present ahead what an earlier restore is known to have needed. track_dirty: as in VMConfig. paused: leave
        it paused; ``resume`` lets it run. shells: do it in a VM that was made ahead.

        Raises SnapshotDamaged, SnapshotMismatch, SnapshotError where there is none, ConfigError, HostError,
        MachineError. Cancelled or failed, it leaves nothing behind.
        """
        begin_ns = time.monotonic_ns()  # before what the first one imports
        restored, wanted = _restoring().restored, (prefetch, track_dirty, paused, shells)
        vm: VM = await restored(cls, snapshot, wanted, begin_ns, name=name, prepare=prepare, configure=configure)
        return vm

    async def go(self) -> None:
        """Give the guest fresh entropy and the time, and let a workload that is held before its exec be run.

        Raises StateError unless the VM is ready and PID 1 is ours.
        """
        from asyncvmm.snapshot.handshake import go_lines

        self._home.check("go")
        machine = self._attempt.machine if self._attempt else None
        if machine is None or self.state != "ready" or not self._watch.contract.ready_on_control:
            raise StateError("go", expected="a ready VM whose PID 1 listens", state=self.state)
        await machine.write("control", go_lines(machine))
        self._hold.is_on = False

    @contextmanager
    def _workload_held(self, order: SnapshotOrder) -> Iterator[None]:
        """PID 1 holds the workload for what the block does, if the order is for that and there is time yet."""
        if not order.wants_pre_exec:
            yield
            return
        try:
            with self._hold.wanted():
                self._tell_hold()
                yield
        finally:
            self._tell_hold()
            self._let_workload_go()

    def _tell_hold(self) -> None:
        """Have the guest be booted as is wanted by now, if it was not begun with."""
        if self._attempt is None and self.state in ("new", "starting"):
            self.config = attrs.evolve(self.config, pre_exec_window=self._hold.is_wanted)

    def _let_workload_go(self) -> None:
        """If it is held, it can be told, and nobody wants it held any more: soon, whatever becomes of the caller."""
        is_ready = self._hold.is_on and not self._hold.is_wanted and self.state == "ready"
        if is_ready and (self._going is None or self._going.done()):
            self._going = asyncio.get_running_loop().create_task(self._go_unless_stopped())

    async def _go_unless_stopped(self) -> None:
        with suppress(StateError, MachineError), self._activities.begin("go"):  # the guest's end is told otherwise
            await self.go()

    def _made_of(self) -> dict[str, Any]:
        """What a VM that is made of a snapshot says of that as it starts; nothing if it boots."""
        if self._restoring is None:
            return {}
        manifest = self._restoring.snapshot.manifest
        return {"accel": manifest.machine, "snapshot": manifest.id, "clone": self._clone}

    @cached_property
    def _snapshots(self) -> SnapshotTaker:
        from asyncvmm.snapshot.taking import SnapshotTaker

        return SnapshotTaker(cast("VM", self))
