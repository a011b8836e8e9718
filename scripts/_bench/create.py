"""From nothing to a VM's first exit, 256 MiB and one vCPU, beside a C program that makes the same system calls.

Twice: the library's synchronous part (what a worker thread does), and a whole ``KvmMachine.start()``, which adds the
worker thread, reading and planning the kernel, the vCPU's thread, and the way of the guest's output to the loop.

What is decided before the first system call is decided before the clock starts, on both sides: the C program has its
recipe, the library its blueprint, made anew for each VM (the phase in the detail says how long that takes). The calls
are the same ones.

The order of the calls matters more than the language: a memslot registered behind the interrupt controllers waits for
a grace period of the kernel's. And KVM_CREATE_VM takes the longer the more mappings its process has, an interpreter's
being hundreds: so one of the three floors is the C code loaded into this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from _bench.bench import Bench
from _bench.build import build_floor, build_floor_library, build_guest
from _bench.figure import Figure, Target
from _bench.floor import Floor, LoadedFloor, running_floor
from _bench.guest import GuestRun, layout_of, plan_of
from _bench.recipe import write_recipe
from _bench.turns import Turns, take_turns, take_turns_async
from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.contents import Contents
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.fds import raw_ioctl
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout

MEMORY_MIB = 256
_KVM_RUN = int(Request.KVM_RUN)
LIMIT = Target("ratio", "<=", 1.10)
SAME_CALLS = "C program making the same system calls in the same order"
SAME_PROCESS = "the same C calls in the same address space"
USUAL_ORDER = "C program in the usual order: interrupt controllers before memory"


async def measure(bench: Bench) -> list[Figure]:
    """create_to_first_exit beside three floors, and start_to_first_effect."""
    guest = build_guest(bench, "first_exit")
    layout = layout_of(guest, MEMORY_MIB)
    recipe = write_recipe(bench.cache / "first_exit.recipe", layout, MEMORY_MIB << 20)
    words = (build_floor(bench, "floor_create"), str(recipe), str(MEMORY_MIB))
    loaded = LoadedFloor(build_floor_library(bench, "floor_create"), recipe, MEMORY_MIB)
    rounds = bench.rounds(60, 10)
    with running_floor(*words) as floor, running_floor(*words, "irqchip-first") as usual:
        return [
            _created(layout, floor, rounds, SAME_CALLS, LIMIT),
            _created(layout, loaded, rounds, SAME_PROCESS, LIMIT),
            _created(layout, usual, rounds, USUAL_ORDER, None),
            await _started(guest, floor, rounds),
        ]


def _created(layout: BootLayout, floor: Floor | LoadedFloor, rounds: int, peer: str, target: Target | None) -> Figure:
    phases: dict[str, list[int]] = {}
    contents = Contents(layout.cpu, layout.segments)
    turns = take_turns(lambda: _create(contents, phases), floor.sample, rounds, warm_up=3)
    return _figure("create_to_first_exit", turns, peer, target, {"phases_us": _medians(phases)})


async def _started(guest: Path, floor: Floor, rounds: int) -> Figure:
    async def floor_sample() -> float:
        return floor.sample()

    turns = await take_turns_async(lambda: _start(guest), floor_sample, rounds, warm_up=3)
    detail = {"of": "KvmMachine.start() to the guest's end seen on the loop"}
    return _figure("start_to_first_effect", turns, SAME_CALLS, LIMIT, detail)


def _create(contents: Contents, phases: dict[str, list[int]]) -> float:
    timeline = Timeline()
    with timeline.phase("blueprint"):
        plan = blueprint(MEMORY_MIB << 20, 1, contents)
    begin = time.monotonic_ns()
    vm = KvmVm(plan, timeline)
    try:
        raw_ioctl(vm.vcpus[0].fd, _KVM_RUN, 0)
        took = time.monotonic_ns() - begin
    finally:
        vm.close()
    for name, duration in timeline.durations().items():
        phases.setdefault(name, []).append(duration)
    return float(took)


async def _start(guest: Path) -> float:
    run = GuestRun(plan_of(guest, MEMORY_MIB))
    begin = time.monotonic_ns()
    await run.start()
    await run.ended
    took = time.monotonic_ns() - begin
    await run.stop()
    await asyncio.sleep(0)
    return float(took)


def _medians(phases: dict[str, list[int]]) -> dict[str, float]:
    return {name: sorted(values)[len(values) // 2] / 1000 for name, values in phases.items()}


def _figure(name: str, turns: Turns, peer: str, target: Target | None, detail: Mapping[str, object]) -> Figure:
    return Figure(
        name=name,
        unit="us",
        ours=[value / 1000 for value in turns.ours],
        peer_name=peer,
        peer=[value / 1000 for value in turns.peer],
        target=target,
        conditions={"python_thread": "idle", "memory_mib": MEMORY_MIB, "vcpus": 1},
        detail=detail,
    )
