"""A toy guest on QEMU, saved and restored."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import PATIENCE_S, TOY_MIB, Witness, holdings


@attrs.frozen
class Taken:
    """A machine that was saved, and its memory file."""

    machine: SavedMachine
    file: Path

    def plan(self, fd: int) -> RestorePlan:
        return RestorePlan(saved=self.machine, layers=(MemoryLayer(fd=fd, map=self.machine.memory),))

    async def checksum(self) -> str:
        return await anyio.to_thread.run_sync(lambda: hashlib.md5(self.file.read_bytes()).hexdigest())


async def take(machine: QemuMachine, file: Path, memory_mib: int = TOY_MIB) -> Taken:
    """Save a paused machine."""
    with file.open("w+b") as opened:
        saved = await machine.save(MemoryWriter(opened.fileno(), memory_mib << 20))
    return Taken(saved, file)


@asynccontextmanager
async def restored(
    plan: BootPlan, taken: Taken, qemu: QemuBinary, **options: Any
) -> AsyncIterator[tuple[QemuMachine, Witness]]:
    """A machine restored, its vCPUs held, and stopped at the end. The memory file is closed once it is there."""
    witness = Witness()
    machine = QemuMachine(plan, Timeline(), witness.take, qemu=qemu, **options)
    with taken.file.open("rb") as file:
        await machine.restore(taken.plan(file.fileno()))
    try:
        yield machine, witness
    finally:
        await machine.stop()


async def refused(plan: BootPlan, restore_plan: RestorePlan, qemu: QemuBinary, error: type[Exception]) -> str:
    """A restore that fails so, and leaves nothing; what it says."""
    before = holdings()
    witness = Witness()
    machine = QemuMachine(plan, Timeline(), witness.take, qemu=qemu)
    with anyio.fail_after(PATIENCE_S), pytest.raises(error) as caught:
        await machine.restore(restore_plan)
    assert not holdings() - before
    assert not witness.effects
    return str(caught.value)
