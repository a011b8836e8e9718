"""A snapshot of a running VM: how long it takes, beside a plain copy of the touched pages; what its files take up; how
long the guest stands still when memory is copied ahead; and how soon after the trigger its vCPUs stand.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio.to_thread
import attrs

from _bench.bench import Bench
from _bench.build import build_floor
from _bench.figure import Figure, Target
from _bench.floor import Floor, running_floor
from _bench.saved import CONDITIONS, MEMORY_MIB, Awaited, kvm_of, middle, running
from asyncvmm.events.snapshot_types import SnapshotSaved
from asyncvmm.vm import VM

SAVE_RATIO = Target("ratio", "<=", 1.3)
EXTRA_LIMIT = Target("ours", "<=", 1024)
PAUSE_LIMIT = Target("ours", "<=", 20)
TRIGGER_LIMIT = Target("ours", "<=", 0.5)
SMALL_MIB = 32
"""Of the guest whose vCPUs are made to stand: its memory is no part of that."""

PAGES_A_SECOND = 256
_PARK_TIMEOUT_S = 5.0


@attrs.define
class Saves:
    """Snapshots of one VM, each gone again."""

    vm: VM
    holder: Path
    events: list[SnapshotSaved] = attrs.field(factory=list)
    took: list[float] = attrs.field(factory=list)
    extra_kib: list[float] = attrs.field(factory=list)

    async def take(self, *, precopy: bool = False) -> float:
        """Nanoseconds of one."""
        told = Awaited(SnapshotSaved)
        told.prepare(self.vm)
        path = self.holder / "snapshot"
        begin = time.monotonic_ns()
        snapshot = await self.vm.snapshot(out=path, precopy=precopy)
        took = float(time.monotonic_ns() - begin)
        event = await told.wait()
        assert isinstance(event, SnapshotSaved)
        self.events.append(event)
        self.extra_kib.append((allocated(path) - snapshot.manifest.memory.data_bytes) / 1024)
        snapshot.close()
        await anyio.to_thread.run_sync(shutil.rmtree, path)
        return took

    def pauses_ms(self) -> list[float]:
        """How long the guest stood."""
        return [event.pause_duration_ns / 1e6 for event in self.events]


def allocated(path: Path) -> int:
    """Bytes that a directory's files take up."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


async def measure(bench: Bench) -> list[Figure]:
    """snapshot_save and snapshot_extra_bytes."""
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder:
        async with running(bench) as vm:
            saves = Saves(vm, Path(holder))
            await saves.take()
            touched_kib = await _touched_kib(vm)
            words = (f"{holder}/copy", str(MEMORY_MIB), str(touched_kib))
            with running_floor(build_floor(bench, "floor_copy"), *words) as floor:
                ours, peer = await _in_turns(saves.take, floor, bench.rounds(20, 3))
    return [_save(saves, ours, peer, touched_kib), _extra(saves, touched_kib)]


async def _touched_kib(vm: VM) -> int:
    async with await vm.snapshot() as snapshot:
        return snapshot.manifest.memory.data_bytes >> 10


async def _in_turns(take: Callable[[], Awaitable[float]], floor: Floor, rounds: int) -> tuple[list[float], list[float]]:
    ours, peer = [], []
    for _ in range(rounds):
        ours.append(await take() / 1e6)
        peer.append(floor.sample() / 1e6)
    return ours, peer


def _save(saves: Saves, ours: list[float], peer: list[float], touched_kib: int) -> Figure:
    return Figure(
        name="snapshot_save",
        unit="ms",
        ours=ours,
        peer_name="C program writing the touched pages, fsync of file and directory",
        peer=peer,
        target=SAVE_RATIO,
        conditions=CONDITIONS,
        detail={"written_kib": touched_kib, "pause_ms": middle(saves.pauses_ms())},
    )


def _extra(saves: Saves, touched_kib: int) -> Figure:
    return Figure(
        name="snapshot_extra_bytes",
        unit="KiB",
        ours=saves.extra_kib,
        target=EXTRA_LIMIT,
        conditions=CONDITIONS,
        detail={"besides_kib": touched_kib},
    )


# -- how long the guest stands -----------------------------------------------------------------------------------------


async def measure_pause(bench: Bench) -> list[Figure]:
    """snapshot_pause, of a guest that writes to 1 MiB a second."""
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder:
        async with running(bench) as vm:
            await _make_dirty(vm)
            ahead, at_once = Saves(vm, Path(holder)), Saves(vm, Path(holder))
            for _ in range(bench.rounds(20, 3)):
                await ahead.take(precopy=True)
                await at_once.take()
    return [
        Figure(
            name="snapshot_pause",
            unit="ms",
            ours=ahead.pauses_ms(),
            peer_name="the same without copying ahead",
            peer=at_once.pauses_ms(),
            target=PAUSE_LIMIT,
            conditions={**CONDITIONS, "guest_writes": "1 MiB/s"},
        )
    ]


async def _make_dirty(vm: VM) -> None:
    made = kvm_of(vm)._vm
    assert made is not None
    reader = vm.console.subscribe()
    await vm.console.write(b"d" + struct.pack("<I", made.tsc_khz * 1000 // PAGES_A_SECOND))
    await anext(reader)
    await reader.aclose()


# -- from the trigger to where no vCPU runs ----------------------------------------------------------------------------


async def measure_trigger(bench: Bench) -> list[Figure]:
    """trigger_to_paused, two vCPUs."""
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder:
        async with running(bench, two=True, memory_mib=SMALL_MIB) as vm:
            saves, kicks = Saves(vm, Path(holder)), []
            for _ in range(bench.rounds(100, 5)):
                await saves.take()
                kicks.append(_kick(vm))
    return [
        Figure(
            name="trigger_to_paused",
            unit="ms",
            ours=[(event.paused_ns - event.trigger_ns) / 1e6 for event in saves.events],
            peer_name="both vCPUs kicked and waited for, nothing else",
            peer=kicks,
            target=TRIGGER_LIMIT,
            conditions={"memory_mib": SMALL_MIB, "vcpus": 2},
        )
    ]


def _kick(vm: VM) -> float:
    """Milliseconds until both stand, asked by this thread, which waits for them."""
    made = kvm_of(vm)._vm
    assert made is not None
    begin = time.monotonic_ns()
    for vcpu in made.vcpus:
        vcpu.order("pause")
    for vcpu in made.vcpus:
        vcpu.wait_parked(_PARK_TIMEOUT_S)
    took = (time.monotonic_ns() - begin) / 1e6
    for vcpu in made.vcpus:
        vcpu.order("run")
    return took
