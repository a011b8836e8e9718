"""From a snapshot that is loaded to a VM's first exit, beside a C program that makes the same system calls.

Three times, so that it shows where Python's share is: the chain of system calls alone, the machine, and ``VM.restore``
as a program calls it. And all of it from VMs made ahead. The peers are C in a process of its own and, since
KVM_CREATE_VM takes the longer the more mappings its process has, the same C in this one: by the thread that asks for it
and by another one, for a loop goes on meanwhile. What ``VM.restore`` has done before it is called, as it needs no VM,
they do when they are called: open /dev/kvm, and map memory. Nobody prefetches.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import attrs

from _bench.bench import Bench
from _bench.build import build_floor, build_floor_library
from _bench.figure import Figure, Target
from _bench.floor import Floor, LoadedFloor, running_floor
from _bench.restore_recipe import write_restore_recipe
from _bench.saved import CONDITIONS, MEMORY_MIB, first_exit_ns, kvm_of, saved
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.fds import raw_ioctl
from asyncvmm.machine.kvm.launch import prepare_launch
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.restoring import RestoreBlueprint, Shell, restore_blueprint
from asyncvmm.machine.kvm.runner import make_one
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.timing.timeline import Timeline
from asyncvmm.vm import VM

WARM_UP = 3
SHELLS = 2
RATIO = Target("ratio", "<=", 1.15)
SHELL_LIMIT = Target("ours", "<=", 1.0)
SAME_CALLS = "C program making the same system calls"
SAME_PROCESS = "the same C calls in the same address space"
HANDED = "the same C calls in the same address space, by a thread that is woken for them"
C_SHELL = "C program filling a VM made ahead"
_KVM_RUN = int(Request.KVM_RUN)

Sample = Callable[[], Awaitable[float]]


async def measure(bench: Bench) -> list[Figure]:
    """restore_to_first_exit and shell_to_first_exit."""
    async with saved(bench) as snapshot, _sides(bench, snapshot) as sides:
        samples = await _in_turns(sides.samples(), bench.rounds(40, 3))
    return _figures(samples, sides.phases)


@attrs.define
class Sides:
    """What is measured: ours on three levels, from nothing and from shells, and the floors."""

    snapshot: Snapshot
    plan: RestoreBlueprint
    floor: Floor
    loaded: LoadedFloor
    pool: ShellPool
    phases: dict[str, list[float]] = attrs.field(factory=dict)

    def samples(self) -> dict[str, Sample]:
        """Each takes one, in ns."""
        return {
            "C": self._word("go"),
            "VM.restore": self._vm(None),
            "loaded C": self._loaded(handed=False),
            "handed C": self._loaded(handed=True),
            "KvmMachine.restore": lambda: self._machine(shell=False),
            "chain": self._chain,
            "C shell": self._word("shell"),
            "VM.restore from a ShellPool": self._vm(self.pool),
            "KvmMachine.restore in a shell": lambda: self._machine(shell=True),
            "chain in a shell": self._filled,
        }

    def _word(self, word: str) -> Sample:
        async def sample() -> float:
            return self.floor.sample(word)

        return sample

    def _loaded(self, *, handed: bool) -> Sample:
        async def sample() -> float:
            return self.loaded.sample(handed=handed)

        return sample

    def _vm(self, pool: ShellPool | None) -> Sample:
        async def sample() -> float:
            if pool is not None:
                await pool.fill()
            begin = time.monotonic_ns()
            async with await VM.restore(self.snapshot, prefetch=False, shells=pool) as vm:
                took = await first_exit_ns(kvm_of(vm)) - begin
                if pool is None:
                    self._note("VM.restore", vm.timeline)
            return float(took)

        return sample

    async def _machine(self, *, shell: bool) -> float:
        made = Shell(self.plan.shape.shell, Timeline()) if shell else None
        boot = BootPlan(name="bench", memory_mib=MEMORY_MIB, vcpus=1, kernel=Path(), initrd=None)
        plan = self.snapshot.restore_plan(prefetch=False)
        prepared = prepare_launch(plan, in_shell=shell)
        await in_thread(make_one)
        if prepared is not None:
            prepared.arm()
        begin = time.monotonic_ns()
        launch = None if prepared is None else prepared.begin(True, None if made is None else lambda: made)
        machine = KvmMachine(boot, Timeline(), lambda _: None)
        try:
            await machine.restore(plan, shell=made if launch is None else None, launch=launch)
            if launch is None:
                await machine.resume()
            return float(await first_exit_ns(machine) - begin)
        finally:
            await machine.stop()

    async def _chain(self) -> float:
        timeline = Timeline()
        begin = time.monotonic_ns()
        took = _entered(self.plan.run(timeline), begin)
        self._note("chain", timeline)
        return took

    async def _filled(self) -> float:
        shell = Shell(self.plan.shape.shell, Timeline())
        begin = time.monotonic_ns()
        return _entered(self.plan.fill(shell, Timeline()), begin)

    def _note(self, side: str, timeline: Timeline) -> None:
        for name, duration in timeline.durations().items():
            self.phases.setdefault(f"{side}: {name}", []).append(duration / 1000)


def _entered(vm: KvmVm, begin: int) -> float:
    try:
        raw_ioctl(vm.vcpus[0].fd, _KVM_RUN, 0)
        return float(time.monotonic_ns() - begin)
    finally:
        vm.close()


@asynccontextmanager
async def _sides(bench: Bench, snapshot: Snapshot) -> AsyncIterator[Sides]:
    plan = restore_blueprint(snapshot.restore_plan(prefetch=False))
    recipe = write_restore_recipe(bench.cache / "restore.recipe", snapshot, plan)
    loaded = LoadedFloor(build_floor_library(bench, "floor_restore"), recipe, MEMORY_MIB)
    words = (build_floor(bench, "floor_restore"), str(recipe), str(MEMORY_MIB))
    with running_floor(*words) as floor:
        async with ShellPool(snapshot, size=SHELLS) as pool:
            yield Sides(snapshot, plan, floor, loaded, pool)


async def _in_turns(sides: dict[str, Sample], rounds: int) -> dict[str, list[float]]:
    """In another order each round, the same in each run: what one side leaves behind, warm caches or a VM whose end the
    kernel has yet to see to, is worth a tenth to the next."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UP + rounds):
        for name in sorted(sides, key=lambda name: sha256(f"{number} {name}".encode()).digest()):
            took = await sides[name]()
            if number >= WARM_UP:
                found[name].append(took)
    return found


def _figures(samples: dict[str, list[float]], phases: dict[str, list[float]]) -> list[Figure]:
    details = {"phases_us": {name: round(sorted(found)[len(found) // 2], 1) for name, found in phases.items()}}
    pairs: list[tuple[str, str, str, str, Target | None]] = [
        ("restore_to_first_exit", "VM.restore", "C", SAME_CALLS, RATIO),
        ("restore_to_first_exit", "VM.restore", "loaded C", SAME_PROCESS, RATIO),
        ("restore_to_first_exit", "VM.restore", "handed C", HANDED, None),
        ("restore_to_first_exit", "handed C", "C", SAME_CALLS, None),
        ("restore_to_first_exit", "KvmMachine.restore", "C", SAME_CALLS, None),
        ("restore_to_first_exit", "chain", "C", SAME_CALLS, None),
        ("restore_to_first_exit", "chain", "loaded C", SAME_PROCESS, None),
        ("shell_to_first_exit", "VM.restore from a ShellPool", "C shell", C_SHELL, SHELL_LIMIT),
        ("shell_to_first_exit", "KvmMachine.restore in a shell", "C shell", C_SHELL, SHELL_LIMIT),
        ("shell_to_first_exit", "chain in a shell", "C shell", C_SHELL, None),
    ]
    return [
        Figure(
            name=name,
            unit="ms",
            ours=[value / 1e6 for value in samples[ours]],
            peer_name=peer_name,
            peer=[value / 1e6 for value in samples[peer]],
            target=target,
            conditions={**CONDITIONS, "ours": ours},
            order="shuffled",
            detail=details if ours == "VM.restore" and peer == "C" else {},
        )
        for name, ours, peer, peer_name, target in pairs
    ]
