"""Restores that are launched (asyncvmm/machine/kvm/launch.py): snapshots that are prepared for them, and what is told.

The guest is tests/guests/kvm/foreign.S: ``E`` echoes, polling its serial port, ``H`` halts for good, and
``G`` echoes without a look whether there is anything.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs

from asyncvmm import VM, VMConfig
from asyncvmm.events.base import Event
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot
from tests.support.holdings import Holdings

MEMORY_MIB = 69
"""A size that no other mapping has."""
PATIENCE_S = 60
PLAIN, IN_SHELL, PREFETCHED = (False, False, False), (False, False, True), (True, False, False)

Ready = Callable[[str], AbstractAsyncContextManager[Snapshot]]
Count = Callable[..., Holdings]


@asynccontextmanager
async def ready_snapshot(kernel: Path, program: str) -> AsyncIterator[Snapshot]:
    """A snapshot of a guest with that program, all kinds of whose restores are prepared."""
    config = VMConfig(kernel=kernel, cmdline=program, memory_mib=MEMORY_MIB, accel="kvm")
    async with VM(config) as original:
        await original.boot()
        snapshot = await original.snapshot(then="stop")
    async with snapshot:
        await prepare(snapshot)
        yield snapshot


@asynccontextmanager
async def grasping_snapshot(kernel: Path) -> AsyncIterator[Snapshot]:
    """A snapshot of a guest whose first access will take ``x`` out of its serial port; a restore of it is prepared."""
    config = VMConfig(kernel=kernel, cmdline="RG", memory_mib=MEMORY_MIB, accel="kvm")
    async with VM(config) as original:
        await original.boot()
        await original.pause()
        await kvm_of(original).write("console", b"x")
        snapshot = await original.snapshot(then="stop")
    async with snapshot:
        while PREFETCHED not in snapshot.prepared:
            async with await VM.restore(snapshot):
                await anyio.sleep(0.02)
        await in_thread(await_a_runner)
        yield snapshot


async def prepare(snapshot: Snapshot) -> None:
    """Have each kind of restore prepared, and armed."""
    async with ShellPool(snapshot) as shells:
        for options in ({"prefetch": False}, {"prefetch": False, "shells": shells}, {}):
            async with await VM.restore(snapshot, **options):
                pass
    assert {PLAIN, IN_SHELL, PREFETCHED} <= set(snapshot.prepared)
    await in_thread(await_a_runner)


def await_a_runner() -> None:
    """It says itself when it is ready."""
    runner.make_one()
    while not runner.any_idle():
        time.sleep(0.001)


def hear(vm: VM, told: list[Event]) -> None:
    """Put down its events."""
    vm.events.attach(told.append)


def kvm_of(vm: VM) -> KvmMachine:
    """The machine underneath."""
    assert isinstance(vm._machine, KvmMachine)
    return vm._machine


def faulty(snapshot: Snapshot, kind: LaunchKind, **changes: Any) -> None:
    """Have launches of that kind go wrong."""
    prepared = snapshot.prepared[kind]
    snapshot.forget_prepared(kind)
    snapshot.prepared[kind] = attrs.evolve(prepared, chain=attrs.evolve(prepared.chain, **changes))


def disarm(snapshot: Snapshot) -> None:
    """Have no launch of it armed, which would be a descriptor."""
    for prepared in snapshot.prepared.values():
        prepared.disarm()


def held(count: Count, snapshot: Snapshot) -> Holdings:
    """What there is but for launches that are armed."""
    disarm(snapshot)
    return count(MEMORY_MIB << 20)
