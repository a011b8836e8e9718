"""The guest that the bench saves and restores, its snapshots, and when a restored one is where.

See guests/saved.S: 256 MiB of which 32 MiB are touched, in ring 3 or, where it is to rest at no cost, in ring 0. It
polls its serial port, so its first exit comes at once. A byte that the port holds when it is saved is there for every
VM that is restored: that is what they do then.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from _bench.bench import Bench, Skipped
from _bench.build import build_guest
from asyncvmm.config import VMConfig
from asyncvmm.events.base import Event
from asyncvmm.machine.base import AccelName
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.vm import VM

MEMORY_MIB = 256
TOUCHED_MIB = 32
READS, WRITES = 1024, 256
"""Pages that a restored guest which was told to work reads, and writes, before it is heard of."""

CONDITIONS = {"memory_mib": MEMORY_MIB, "touched_mib": TOUCHED_MIB, "vcpus": 1}
_LOOK_AGAIN_S = 0.0002
_PATIENCE_S = 60


def saved_guest(bench: Bench, *, two: bool = False, ring0: bool = False, touched_mib: int = TOUCHED_MIB) -> Path:
    """The guest. Raises Skipped without a compiler."""
    defines = {"TOUCHED_MIB": touched_mib, "READS": READS, "WRITES": WRITES, "TWO": int(two), "RING0": int(ring0)}
    return build_guest(bench, "saved", **defines)


@asynccontextmanager
async def running(
    bench: Bench,
    *,
    accel: AccelName = "kvm",
    two: bool = False,
    ring0: bool = False,
    memory_mib: int = MEMORY_MIB,
) -> AsyncIterator[VM]:
    """A VM that has touched its memory and waits for its orders."""
    touched = min(TOUCHED_MIB, memory_mib // 4)
    guest = saved_guest(bench, two=two, ring0=ring0, touched_mib=touched)
    config = VMConfig(kernel=guest, cmdline="", memory_mib=memory_mib, vcpus=1 + two, accel=accel)
    async with VM(config) as vm:
        await vm.boot()
        yield vm


@asynccontextmanager
async def saved(
    bench: Bench, told: bytes = b"", *, accel: AccelName = "kvm", ring0: bool = False
) -> AsyncIterator[Snapshot]:
    """A snapshot of it, with ``told`` in its serial port. Gone after the block."""
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder:
        async with running(bench, accel=accel, ring0=ring0) as vm:
            await vm.pause()
            if told:
                machine = vm._machine
                assert machine is not None
                await machine.write("console", told)
            snapshot = await vm.snapshot(out=Path(holder) / "snapshot", then="stop")
        async with snapshot:
            yield snapshot


def kvm_of(vm: VM) -> KvmMachine:
    """The machine underneath."""
    machine = vm._machine
    assert isinstance(machine, KvmMachine)
    return machine


async def first_exit_ns(machine: KvmMachine) -> int:
    """When a restored guest came out for the first time. Raises Skipped for one that does not."""
    marks = machine.restored
    assert marks is not None
    for _ in range(int(_PATIENCE_S / _LOOK_AGAIN_S)):
        if marks.first_exit_ns is not None:
            return marks.first_exit_ns
        await asyncio.sleep(_LOOK_AGAIN_S)
    raise Skipped("the restored guest makes no exit")


class Awaited:
    """An event of a VM that is to come: ``prepare`` is VM.restore's."""

    def __init__(self, kind: type[Event]) -> None:
        self._event: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._kind = kind

    def prepare(self, vm: VM) -> None:
        """Have this VM's event heard."""
        vm.events.attach(self._hear)

    async def wait(self) -> Event:
        """The event. Raises Skipped if it does not come."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._event
        except TimeoutError:
            raise Skipped(f"no {self._kind.__name__}") from None

    def _hear(self, event: Event) -> None:
        if isinstance(event, self._kind) and not self._event.done():
            self._event.set_result(event)


def middle(values: list[float]) -> float:
    """Their median, for details."""
    return round(sorted(values)[len(values) // 2], 2)
