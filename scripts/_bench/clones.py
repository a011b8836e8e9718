"""Many VMs of one snapshot in one process: what one more costs when so many live, and how many a second there can be.

Every VM has an mmu notifier in the one address space, which each copy-on-write fault calls: restore and faults get
dearer with their number, for C as for us. The C program keeps as many VMs alive as we do at each point of the curve.
Guests halt when they have said their word: what is measured is that they exist, not that they run.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import attrs

from _bench.bench import Bench
from _bench.build import build_floor
from _bench.figure import Figure, Target
from _bench.first_event import WORK
from _bench.floor import Floor, running_floor
from _bench.restore_recipe import write_restore_recipe
from _bench.saved import CONDITIONS, MEMORY_MIB, Awaited, first_exit_ns, kvm_of, middle, saved
from _bench.smaps import NO_MEMORY, Memory, kernel_memory, private_memory
from asyncvmm.events.snapshot_types import RestoreFirstGuestEvent
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.restoring import restore_blueprint
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.vm import VM

LEVELS = (1, 10, 50, 100, 200)
QUICK_LEVELS = (1, 5)
CLONES, QUICK_CLONES = 100, 5
WARM_UP = 10
REST = b"i"
PAGE, PAGES, AT = 4096, 256, 32 << 20
"""Pages that are written to see what a fault costs: how many, and where in memory, amid what the guest has filled."""

MEMORY_LIMIT = Target("ours", "<=", 512)
C_RESTORE = "C program with as many live VMs"
_KEPT = [0]


@attrs.define
class Point:
    """With ``live`` VMs there already: the samples of one more."""

    live: int
    restore_ms: list[float] = attrs.field(factory=list)
    copy_us: list[float] = attrs.field(factory=list)
    fresh_us: list[float] = attrs.field(factory=list)
    c_restore_ms: list[float] = attrs.field(factory=list)
    c_copy_us: list[float] = attrs.field(factory=list)
    c_fresh_us: list[float] = attrs.field(factory=list)
    memory: Memory = NO_MEMORY
    kernel: dict[str, int] = attrs.field(factory=dict)


async def measure(bench: Bench) -> list[Figure]:
    """clones_restore, clones_fault, clones_memory and clones_per_second."""
    levels = QUICK_LEVELS if bench.quick else LEVELS
    async with saved(bench, WORK, ring0=True) as snapshot:
        with _floor(bench, snapshot) as floor:
            points = await _curve(snapshot, floor, levels, bench.rounds(10, 2))
    return [*_restores(points), *_faults(points), *_memories(points), *await _measure_rate(bench)]


async def _measure_rate(bench: Bench) -> list[Figure]:
    """Of guests that rest at once: what the host does for each is measured, not what they do."""
    async with saved(bench, REST, ring0=True) as snapshot:
        with _floor(bench, snapshot) as floor:
            return await _rates(snapshot, floor, QUICK_CLONES if bench.quick else CLONES, bench.rounds(5, 1))


@contextmanager
def _floor(bench: Bench, snapshot: Snapshot) -> Iterator[Floor]:
    plan = restore_blueprint(snapshot.restore_plan(prefetch=False))
    recipe = write_restore_recipe(bench.cache / "clones.recipe", snapshot, plan)
    with running_floor(build_floor(bench, "floor_restore"), str(recipe), str(MEMORY_MIB)) as floor:
        yield floor


# -- the curve ---------------------------------------------------------------------------------------------------------


async def _curve(snapshot: Snapshot, floor: Floor, levels: tuple[int, ...], rounds: int) -> list[Point]:
    live: list[VM] = []
    points: list[Point] = []
    try:
        await _warm_up(snapshot)
        for level in (0, *levels):
            for _ in range(level - len(live)):
                live.append(await _spoken(snapshot))
                floor.sample("keep")
            point = Point(level)
            gc.collect()
            point.memory, point.kernel = private_memory(_places(live)), kernel_memory()
            for _ in range(rounds if level else 0):
                await _sample(snapshot, floor, point)
            points.append(point)
        return points
    finally:
        for vm in live:
            await vm.stop()
        floor.sample("free")


async def _warm_up(snapshot: Snapshot) -> None:
    """Memory that VMs take once, and what the first of them finds out, is nobody's."""
    vms = [await _spoken(snapshot) for _ in range(WARM_UP)]
    for vm in vms:
        await vm.stop()


async def _spoken(snapshot: Snapshot) -> VM:
    """A clone that has done its work and stands still."""
    first = Awaited(RestoreFirstGuestEvent)
    vm = await VM.restore(snapshot, prepare=first.prepare, prefetch=False)
    await first.wait()
    return vm


async def _sample(snapshot: Snapshot, floor: Floor, point: Point) -> None:
    begin = time.monotonic_ns()
    async with await VM.restore(snapshot, prefetch=False, paused=True) as vm:
        await vm.resume()
        point.restore_ms.append((await first_exit_ns(kvm_of(vm)) - begin) / 1e6)
        memory = _memory(vm)
        point.copy_us.append(_write_cost(memory, AT, read_first=True))
        point.fresh_us.append(_write_cost(memory, AT + PAGES * PAGE, read_first=False))
    point.c_restore_ms.append(floor.sample("go") / 1e6)
    point.c_copy_us.append(floor.sample("copy") / 1e3 / PAGES)
    point.c_fresh_us.append(floor.sample("fresh") / 1e3 / PAGES)


def _write_cost(memory: GuestMemory, at: int, *, read_first: bool) -> float:
    """Microseconds of a page's first write."""
    view = memory.view
    places = range(at, at + PAGES * PAGE, PAGE)
    if read_first:
        _KEPT[0] = sum(view[place] for place in places)
    begin = time.perf_counter_ns()
    for place in places:
        view[place] = 1
    return (time.perf_counter_ns() - begin) / 1e3 / PAGES


def _memory(vm: VM) -> GuestMemory:
    made = kvm_of(vm)._vm
    assert made is not None
    return made.memory


def _places(live: list[VM]) -> list[tuple[int, int]]:
    return [(memory.host_address, memory.size) for memory in map(_memory, live)]


# -- VMs a second ------------------------------------------------------------------------------------------------------


async def _rates(snapshot: Snapshot, floor: Floor, count: int, rounds: int) -> list[Figure]:
    """``count`` clones from the call to the last one's first exit, and to the block that has them all."""
    ours, handed_out, floors = [], [], []
    for _ in range(rounds):
        begin = time.monotonic_ns()
        async with snapshot.clones(count, beyond_bend=True) as vms:
            handed_out.append(count / (time.monotonic_ns() - begin) * 1e9)
            last = max([await first_exit_ns(kvm_of(vm)) for vm in vms])
            ours.append(count / (last - begin) * 1e9)
        took = sum(floor.sample("keep") for _ in range(count))
        floor.sample("free")
        floors.append(count / took * 1e9)
    return [
        Figure(
            name="clones_per_second",
            unit="VMs/s",
            ours=ours,
            peer_name="C program, one thread, the same calls",
            peer=floors,
            conditions={**CONDITIONS, "clones": count, "cpus": os.cpu_count()},
            detail={"handed_out_per_s": middle(handed_out)},
        )
    ]


# -- figures -----------------------------------------------------------------------------------------------------------


def _restores(points: list[Point]) -> list[Figure]:
    return [
        Figure(
            name="clones_restore",
            unit="ms",
            ours=point.restore_ms,
            peer_name=C_RESTORE,
            peer=point.c_restore_ms,
            conditions={**CONDITIONS, "live": point.live},
        )
        for point in points[1:]
    ]


def _faults(points: list[Point]) -> list[Figure]:
    """Of a page that was read before: the fault that calls every VM's notifier."""
    return [
        Figure(
            name="clones_fault",
            unit="us",
            ours=point.copy_us,
            peer_name=C_RESTORE,
            peer=point.c_copy_us,
            conditions={**CONDITIONS, "live": point.live, "page": "read before it is written"},
            detail={"never_touched_us": middle(point.fresh_us), "never_touched_c_us": middle(point.c_fresh_us)},
        )
        for point in points[1:]
    ]


def _memories(points: list[Point]) -> list[Figure]:
    """Of each VM between two points, KiB: ours besides the guest's pages, the guest's, and the kernel's."""
    figures = []
    for before, after in pairwise(points):
        vms = after.live - before.live
        figures.append(
            Figure(
                name="clones_memory",
                unit="KiB/VM",
                ours=[(after.memory.ours - before.memory.ours) / vms],
                target=MEMORY_LIMIT if before.live else None,  # it is of further VMs
                conditions={**CONDITIONS, "live": after.live, "than": before.live},
                detail={
                    "guest_kib": round((after.memory.guests - before.memory.guests) / vms, 1),
                    "kvm_run_kib": round((after.memory.vcpus - before.memory.vcpus) / vms, 1),
                    "kernel_kib": {
                        name: round((value - before.kernel.get(name, 0)) / vms, 1)
                        for name, value in after.kernel.items()
                    },
                },
            )
        )
    return figures
