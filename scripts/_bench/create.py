"""From nothing to a VM's first exit, 256 MiB and one vCPU, beside a C program that makes the same system calls.

Twice: the library's synchronous part (what a worker thread does), and a whole ``KvmMachine.start()``, which adds the
worker thread, reading and planning the kernel, the vCPU's thread, and the way of the guest's output to the loop.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from _bench.bench import Bench
from _bench.build import build_floor, build_guest
from _bench.figure import Figure, Target
from _bench.floor import running_floor
from _bench.guest import GuestRun, layout_of, plan_of
from _bench.recipe import write_recipe
from _bench.turns import Turns, take_turns, take_turns_async
from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout

MEMORY_MIB = 256
PEER = "C program making the same system calls"


async def measure(bench: Bench) -> list[Figure]:
    """create_to_first_exit and start_to_first_effect."""
    guest = build_guest(bench, "first_exit")
    layout = layout_of(guest, MEMORY_MIB)
    recipe = write_recipe(bench.cache / "first_exit.recipe", layout, MEMORY_MIB << 20)
    rounds = bench.rounds(60, 10)
    phases: dict[str, list[int]] = {}
    with running_floor(build_floor(bench, "floor_create"), str(recipe), str(MEMORY_MIB)) as floor:
        created = take_turns(lambda: _create(layout, phases), floor.sample, rounds, warm_up=3)

        async def floor_sample() -> float:
            return floor.sample()

        started = await take_turns_async(lambda: _start(guest), floor_sample, rounds, warm_up=3)
    return [
        _figure("create_to_first_exit", created, {"phases_us": _medians(phases)}),
        _figure("start_to_first_effect", started, {"of": "KvmMachine.start() to the guest's end seen on the loop"}),
    ]


def _create(layout: BootLayout, phases: dict[str, list[int]]) -> float:
    timeline = Timeline()
    begin = time.monotonic_ns()
    vm = KvmVm(MEMORY_MIB << 20, 1, timeline)
    try:
        for segment in layout.segments:
            vm.memory.write(segment.address, segment.data)
        vm.configure(layout.cpu)
        with timeline.phase("first_run"):
            ioctl(vm.vcpus[0].fd, Request.KVM_RUN)
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


def _figure(name: str, turns: Turns, detail: dict[str, object]) -> Figure:
    return Figure(
        name=name,
        unit="us",
        ours=[value / 1000 for value in turns.ours],
        peer_name=PEER,
        peer=[value / 1000 for value in turns.peer],
        target=Target("ratio", "<=", 1.10),
        conditions={"python_thread": "idle", "memory_mib": MEMORY_MIB, "vcpus": 1},
        detail=detail,
    )
