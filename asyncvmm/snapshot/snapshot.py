"""Snapshot: a saved VM as a program has it: its manifest, and VMs made of it.

    async with vm.snapshot() as snapshot: ...            a directory of its own, which goes with the block
    snapshot = await Snapshot.load("warm")
    vm = await VM.restore(snapshot)

Its files are opened and checked once, however many VMs are made of it.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import attrs

from asyncvmm.config import VMConfig
from asyncvmm.errors import ConfigError, SnapshotDamaged, StateError
from asyncvmm.machine.saved import RestorePlan
from asyncvmm.machine.waiting import in_thread, in_thread_or_here
from asyncvmm.snapshot.guest_record import SECTION, GuestRecord
from asyncvmm.snapshot.loading import Loaded, load
from asyncvmm.snapshot.manifest import Manifest
from asyncvmm.snapshot.working_set import WorkingSet, keep_working_set, read_working_set

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.launch import PreparedLaunch
    from asyncvmm.vm import VM

OWN_PREFIX = "asyncvmm-snapshot-"
"""How the directories are named that snapshots get which nobody gives a place."""

_NOTHING_KNOWN = WorkingSet()

LaunchKind = tuple[bool, bool, bool]
"""Whether restores prefetch, whether they keep account of what is written, and whether they are done in shells."""


class Snapshot:
    """One snapshot, open. ``path`` is its directory. ``unanswering``: PID 1 of a VM made of it was told ``go``, and
    would not answer.

    ``close`` lets go of its files, and removes a directory that nobody named; the VMs made of it need neither.
    """

    def __init__(self, path: Path, loaded: Loaded, working_set: WorkingSet) -> None:
        self.path = path
        self.loaded = loaded
        self.guest = _guest(loaded)
        self.working_set = working_set
        self.unanswering = False
        self.prepared: dict[LaunchKind, PreparedLaunch] = {}
        """Restores that can be launched at once; see launching.py."""
        self._plans: dict[tuple[bool, bool], RestorePlan] = {}
        self._users = 0
        self._closed = False
        self._doomed: list[Path] = []
        self._close = weakref.finalize(self, _let_go, loaded, self.prepared, self._doomed, os.getpid())

    @classmethod
    async def load(cls, path: str | Path, *, check_memory: bool = False) -> Self:
        """Open and check the snapshot at ``path``; ``check_memory`` reads all of its memory for that.

        Raises SnapshotDamaged, SnapshotMismatch, or SnapshotError where there is none.
        """
        if not isinstance(path, str | Path) or path == "":
            raise ConfigError("snapshot", expected="a Snapshot or its directory", found=repr(path)[:80])
        directory = Path(path)
        return await in_thread(lambda: cls.open(directory, check_memory=check_memory), Snapshot.close)

    @classmethod
    def open(cls, directory: Path, *, check_memory: bool = False) -> Self:
        """As ``load``, on a worker thread."""
        loaded = load(directory, check_memory=check_memory)
        try:
            return cls(directory, loaded, read_working_set(directory, loaded.manifest.memory.size))
        except BaseException:
            loaded.close()
            raise

    def __repr__(self) -> str:
        manifest, closed = self.manifest, " closed" if self._closed else ""
        return f"<Snapshot {manifest.id} of {manifest.machine}, {manifest.memory_mib} MiB, at {self.path}{closed}>"

    @property
    def manifest(self) -> Manifest:
        """What is known of it."""
        return self.loaded.manifest

    @property
    def id(self) -> str:
        """Its name among all snapshots."""
        return self.manifest.id

    @cached_property
    def config(self) -> VMConfig:
        """How the VMs made of it are configured. Account of what they write is kept for who asks the restore for it."""
        kept = self.loaded.config
        # A copy kept by name was the saved VM's; each clone has one of its own, which dies with it.
        drives = tuple(attrs.evolve(drive, overlay=drive.overlay is not False) for drive in kept.drives)
        return attrs.evolve(kept, name=None, drives=drives, track_dirty=False)

    @cached_property
    def tracking_config(self) -> VMConfig:
        """The same of VMs for which it is kept."""
        return attrs.evolve(self.config, track_dirty=True)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def is_temporary(self) -> bool:
        """Whether its directory goes when it is closed."""
        return bool(self._doomed)

    def begin_use(self) -> None:
        """Its files stay open until ``end_use``, even if it is closed meanwhile. Raises StateError if it was before."""
        if self._closed:
            raise StateError("snapshot", expected="an open one", state="closed")
        self._users += 1

    async def end_use(self) -> None:
        """Once for each ``begin_use``; a cancellation is heard once that is done."""
        self._users -= 1
        if self._closed and not self._users:
            await in_thread_or_here(self._close)

    def restore_plan(self, *, prefetch: bool = True, track_dirty: bool = False) -> RestorePlan:
        """What a machine restores: the same object, for as long as it is the same."""
        known = self.working_set if prefetch else _NOTHING_KNOWN
        kept = self._plans.get((prefetch, track_dirty))
        if kept is None or kept.touched is not known.touched:
            kept = self._plans[prefetch, track_dirty] = RestorePlan(
                saved=self.loaded.saved,
                layers=self.loaded.layers,
                touched=known.touched,
                written=known.written,
                track_dirty=track_dirty,
                devices=len(self.manifest.devices),
            )
        return kept

    def clones(
        self,
        count: int,
        *,
        prepare: Callable[[VM, int], None] | None = None,
        configure: Callable[[VMConfig, int], VMConfig] | None = None,
        identity: Callable[[VM, int], Awaitable[None]] | None = None,
        at_once: int | None = None,
        track_dirty: bool = False,
        beyond_bend: bool = False,
    ) -> AbstractAsyncContextManager[list[VM]]:
        """``count`` VMs of this one state, all different in their entropy; stopped when the block ends.

        prepare: is called with each VM and its number, from 0, before anything is done with it. configure: gives each
        its configuration, as in VM.restore; without it a vsock's path gets the number behind it, and published ports
        are refused, for only one VM can have them. identity: an async function, awaited with each VM and its number
        before the block begins, for all of them at the same time. at_once: how many are made at the same time.
        track_dirty: as in VM.restore. beyond_bend: allow more than MOST_CLONES in one process, where each costs more
        than the last.

        Raises as VM.restore does; then none is left. ConfigError for a count that is too large.
        """
        from asyncvmm.snapshot.clones import Hooks, make_clones

        hooks = Hooks(prepare, configure, identity)
        return make_clones(self, count, hooks, at_once=at_once, track_dirty=track_dirty, beyond_bend=beyond_bend)

    async def keep_working_set(self, found: WorkingSet) -> None:
        """What a restored guest was found to need first, for the next ones."""
        if not self.working_set:
            self.working_set = found
            for kind in list(self.prepared):
                self.forget_prepared(kind)
            await in_thread(lambda: keep_working_set(self.path, found))

    def forget_prepared(self, kind: LaunchKind) -> None:
        """What was prepared of that kind is of no use any more. On any thread."""
        prepared = self.prepared.pop(kind, None)
        if prepared is not None:
            prepared.retire()

    def remove_when_closed(self) -> None:
        """It was made in a directory of ours, which nobody named: both go with it. Raises ValueError for any other."""
        if not self.path.parent.name.startswith(OWN_PREFIX):
            raise ValueError(f"{self.path} is not in a directory of ours")
        self._doomed[:] = [self.path.parent]

    def close(self) -> None:
        """Let go of its files; a temporary one is gone then. Blocks for as long as that takes. May be called again."""
        self._closed = True
        if not self._users:
            self._close()

    async def aclose(self) -> None:
        """As ``close``, in a worker thread; a cancellation is heard once that is done."""
        await in_thread_or_here(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _guest(loaded: Loaded) -> GuestRecord:
    section = loaded.sections.get(SECTION)
    if section is None:
        raise SnapshotDamaged("saved state", expected=f"a section {SECTION}", found="none")
    return GuestRecord.of_section(section)


def _let_go(loaded: Loaded, prepared: dict[LaunchKind, PreparedLaunch], doomed: list[Path], owner: int) -> None:
    """``owner`` is the process whose launches and directories they are: one that was forked has a copy of all this."""
    loaded.close()
    if os.getpid() != owner:
        return
    for launches in list(prepared.values()):
        launches.retire()
    for directory in doomed:
        shutil.rmtree(directory, ignore_errors=True)
