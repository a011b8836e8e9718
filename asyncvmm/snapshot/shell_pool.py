"""ShellPool: VMs made ahead, with memslots and vCPUs, for restores that have no time to make one (KVM alone).

async with ShellPool(snapshot, size=4) as shells:
    vm = await VM.restore(snapshot, shells=shells)
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

import attrs

from asyncvmm.errors import AsyncVMMError, ConfigError, StateError
from asyncvmm.machine.waiting import in_thread, in_thread_or_here, wait_out
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.restore_chains import ShellShape
    from asyncvmm.machine.kvm.restoring import Shell
    from asyncvmm.machine.saved import RestorePlan
    from asyncvmm.snapshot.snapshot import Snapshot

MOST_SHELLS = 64
"""Shells that a pool keeps: each is a VM to the kernel, and makes every page fault of the process dearer."""

REFILL_AFTER_S = 0.005
"""Seconds from a shell being taken to another being made: until then the restored guest has the machine to itself."""


class ShellPool:
    """Keeps ``size`` shells for restores of ``snapshot``, and of others of the same shape. It belongs to one loop.

    A shell that is taken is replaced a little later, beside what the loop does. A restore that finds none makes one
    itself. ``error`` is why no shell could be made, None if they could.
    """

    def __init__(self, snapshot: Snapshot, size: int = 1, *, track_dirty: bool = False) -> None:
        """Nothing is made yet. Raises ConfigError for a size that makes no sense, and a snapshot that is not KVM's."""
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_SHELLS:
            raise ConfigError("shells", expected=f"1 to {MOST_SHELLS}", found=repr(size))
        if not hasattr(snapshot, "manifest"):
            raise ConfigError("shells", expected="a Snapshot", found=repr(snapshot)[:80])
        if snapshot.manifest.machine != "kvm":
            raise ConfigError("shells", expected="a snapshot of the KVM machine", found=snapshot.manifest.machine)
        self.size = size
        self.error: AsyncVMMError | None = None
        self._shape = _shape(snapshot, track_dirty)
        self._fits: RestorePlan | None = None
        self._shells: deque[Shell] = deque()
        self._filling: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def ready(self) -> int:
        """Shells that wait to be taken."""
        return len(self._shells)

    async def fill(self) -> None:
        """Until it is full. Raises HostError or MemorySizeError if no shell can be made, StateError once closed."""
        if self._closed:
            raise StateError("shells", expected="an open pool", state="closed")
        self._refill()
        while self._filling is not None:
            await wait_out(self._filling)
        if self.error is not None:
            raise self.error

    async def take(self, plan: RestorePlan) -> Shell:
        """One shell, which is the caller's from now on. For VM.restore.

        Raises ConfigError if the plan is of another shape, StateError once the pool is closed, HostError.
        """
        return self.take_ready(plan) or await self._made()

    def take_ready(self, plan: RestorePlan) -> Shell | None:
        """The same; None if none waits to be taken."""
        if self._closed:
            raise StateError("shells", expected="an open pool", state="closed")
        self._check(plan)
        shell = self._shells.popleft() if self._shells else None
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(REFILL_AFTER_S, self._refill)
        return shell

    def _check(self, plan: RestorePlan) -> None:
        if plan is self._fits:
            return
        saved = plan.saved
        found = attrs.evolve(
            self._shape,
            memory_bytes=saved.memory.size,
            vcpus=saved.vcpus,
            devices=plan.devices,
            track_dirty=plan.track_dirty,
        )
        if found != self._shape:
            mine, others = _differences(self._shape, found)
            raise ConfigError("shells", expected=f"a restore with {mine}", found=f"one with {others}")
        self._fits = plan

    def _refill(self) -> None:
        self._rest()
        if self._filling is None and len(self._shells) < self.size:
            self._filling = asyncio.get_running_loop().create_task(self._fill())

    def _rest(self) -> None:
        """Make none later."""
        later, self._later = self._later, None
        if later is not None:
            later.cancel()

    async def _fill(self) -> None:
        try:
            while len(self._shells) < self.size and not self._closed:
                self._shells.append(await self._made())
            self.error = None
        except AsyncVMMError as error:
            self.error = error
        finally:
            self._filling = None

    async def _made(self) -> Shell:
        """A new one; none if cancelled."""
        made: list[Shell] = []
        try:
            await in_thread(lambda: made.append(self._make()))
        except BaseException:
            for shell in made:
                await in_thread_or_here(shell.close)
            raise
        return made[0]

    def _make(self) -> Shell:
        """On a worker thread."""
        from asyncvmm.machine.kvm.restore_chains import with_rings
        from asyncvmm.machine.kvm.restoring import Shell

        return Shell(with_rings(self._shape), Timeline())

    async def aclose(self) -> None:
        """Free what was not taken; a cancellation is heard once that is done. May be called again."""
        self._closed = True
        self._rest()
        try:
            if self._filling is not None:
                await wait_out(self._filling)
        finally:
            await in_thread_or_here(self._free)

    def _free(self) -> None:
        """On a worker thread."""
        while self._shells:
            self._shells.popleft().close()

    async def __aenter__(self) -> Self:
        try:
            await self.fill()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _shape(snapshot: Snapshot, track_dirty: bool) -> ShellShape:
    """Without rings: whether they pay is asked where a shell is made."""
    from asyncvmm.machine.kvm.restore_chains import ShellShape

    manifest = snapshot.manifest
    return ShellShape(
        memory_bytes=manifest.memory.size,
        vcpus=manifest.vcpus,
        devices=len(manifest.devices),
        track_dirty=track_dirty,
    )


def _differences(one: ShellShape, other: ShellShape) -> tuple[str, str]:
    """What each has that the other has not, in words."""
    differing = [(mine, its) for mine, its in zip(_words(one), _words(other), strict=True) if mine != its]
    return " and ".join(mine for mine, _ in differing), " and ".join(its for _, its in differing)


def _words(shape: ShellShape) -> tuple[str, ...]:
    return (
        f"{shape.memory_bytes >> 20} MiB of memory",
        f"{shape.vcpus} vCPU{'s' * (shape.vcpus != 1)}",
        f"{shape.devices or 'no'} device{'s' * (shape.devices != 1)}",
        f"track_dirty={shape.track_dirty}",
    )
