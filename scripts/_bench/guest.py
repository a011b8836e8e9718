"""Small guests on the KVM machine, as the bench runs them: plan, start, effects, end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from asyncvmm.effects import Effect, SerialOutput, Stopped
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout, plan_boot


def plan_of(guest: Path, memory_mib: int) -> BootPlan:
    """The plan of a guest without initrd or command line."""
    return BootPlan(name="bench", memory_mib=memory_mib, vcpus=1, kernel=guest, initrd=None)


def layout_of(guest: Path, memory_mib: int) -> BootLayout:
    """Where the guest's bytes go, and its first registers."""
    return plan_boot(guest.read_bytes(), 0, "", memory_mib << 20, 1)


class GuestRun:
    """One guest's run. ``ended`` gives its Stopped; ``newlines`` are the stamps of those on COM1."""

    def __init__(self, plan: BootPlan) -> None:
        self.ended: asyncio.Future[Stopped] = asyncio.get_running_loop().create_future()
        self.newlines: list[int] = []
        self.machine = KvmMachine(plan, Timeline(), self._take)

    async def start(self) -> None:
        """Create it and let it run."""
        await self.machine.start()

    async def stop(self) -> None:
        """Free it."""
        await self.machine.stop()

    async def run(self) -> None:
        """From start to the guest's own end, and free it."""
        try:
            await self.start()
            await self.ended
        finally:
            await self.stop()

    def _take(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SerialOutput):
                self.newlines += effect.newlines
            elif not self.ended.done():
                self.ended.set_result(effect)
