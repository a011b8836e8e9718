"""How long it takes to find out what a guest wrote, some pages since the last time: by dirty rings, beside bitmaps.

Both VMs keep account from their creation on; the guest is held. Most of a memory is not written to between two looks:
bitmaps are looked through all the same, the longer the larger it is. What a VM's creation takes is in the detail.
"""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path

import attrs

from _bench.bench import Bench, Skipped
from _bench.figure import Figure
from _bench.guest import GuestRun, plan_of
from _bench.saved import middle, saved_guest
from asyncvmm.errors import MemorySizeError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.dirty import DirtyLog
from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.machine.kvm.ring_shape import RING_BYTES, ring_shape
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline

MEMORIES_MIB = (256, 2048, 8192)
PAGES_A_SECOND = 5000
_WRITES_FOR_S = 0.01
_LOOK_AGAIN_S = 0.01
_PATIENCE_S = 60


async def measure(bench: Bench) -> list[Figure]:
    """dirty_collect, for each of MEMORIES_MIB."""
    if ring_shape(0, RING_BYTES) is None:
        raise Skipped("this host's KVM has no dirty rings")
    guest, figures = saved_guest(bench), []
    for memory_mib in MEMORIES_MIB:
        try:
            figures.append(await _collected(bench, guest, memory_mib))
        except MemorySizeError as reason:
            bench.say(f"dirty_collect, {memory_mib} MiB: not measured: {reason}")
    return figures


async def _collected(bench: Bench, guest: Path, memory_mib: int) -> Figure:
    plan = attrs.evolve(plan_of(guest, memory_mib), track_dirty=True)
    rings, bitmaps = (_Writer(attrs.evolve(plan, ring_bytes=ring_bytes)) for ring_bytes in (RING_BYTES, 0))
    try:
        for one in (rings, bitmaps):
            await one.start()
        for _ in range(bench.rounds(60, 5)):
            for one in (rings, bitmaps):
                await one.collect()
    finally:
        for one in (rings, bitmaps):
            await one.run.stop()
    created = {name: _creation_us(bench, memory_mib, size) for name, size in (("rings", RING_BYTES), ("bitmaps", 0))}
    return Figure(
        name="dirty_collect",
        unit="us",
        ours=rings.took_us,
        peer_name="the same by bitmaps",
        peer=bitmaps.took_us,
        conditions={"memory_mib": memory_mib, "vcpus": 1, "ring_bytes": RING_BYTES},
        detail={"pages": middle(rings.pages), "created_us": created},
    )


class _Writer:
    """A guest that writes to one page after the other, and is looked at."""

    def __init__(self, plan: BootPlan) -> None:
        self.run = GuestRun(plan)
        self.took_us: list[float] = []
        self.pages: list[float] = []

    async def start(self) -> None:
        machine = self.run.machine
        await self.run.start()
        await self._ready()
        vm = machine._vm
        assert vm is not None
        await machine.write("console", b"d" + struct.pack("<I", vm.tsc_khz * 1000 // PAGES_A_SECOND))
        await machine.pause()
        self._log().collect([])
        await machine.resume()

    async def _ready(self) -> None:
        for _ in range(int(_PATIENCE_S / _LOOK_AGAIN_S)):
            if self.run.newlines:
                return
            await asyncio.sleep(_LOOK_AGAIN_S)
        raise Skipped("the guest does not become ready")

    async def collect(self) -> None:
        """Let it write, and find out where."""
        machine, vm = self.run.machine, self.run.machine._vm
        assert vm is not None
        await asyncio.sleep(_WRITES_FOR_S)
        await machine.pause()
        sets, log = [PageSet(vm.memory.size) for _ in range(2)], self._log()  # as many as a save has
        begin = time.perf_counter_ns()
        log.collect(sets)
        self.took_us.append((time.perf_counter_ns() - begin) / 1000)
        self.pages.append(len(sets[0]))
        await machine.resume()

    def _log(self) -> DirtyLog:
        log = self.run.machine._building.log
        assert log is not None
        return log


def _creation_us(bench: Bench, memory_mib: int, ring_bytes: int) -> float:
    took, memory = [], memory_mib << 20
    plan = blueprint(memory, 1, track_dirty=True, ring=ring_shape(memory, ring_bytes))
    for _ in range(bench.rounds(20, 3)):
        begin = time.perf_counter_ns()
        vm = KvmVm(plan, Timeline())
        took.append((time.perf_counter_ns() - begin) / 1000)
        vm.close()
    return middle(took)
