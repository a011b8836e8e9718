"""How late the loop hears of a guest's kick, and the guest of the loop's interrupt; beside a C thread in read().

The stop-watch is the guest's time-stamp counter, read just before its kick and first thing in its interrupt handler,
and put on the host's clock by KVM's own offset between the two. One guest for both sides: ours kicks an entropy device
and is timed where that begins to work; the floor's eventfds have nothing behind them.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import attrs
import uvloop

from _bench.bench import Bench, Skipped
from _bench.build import build_floor, build_guest
from _bench.figure import Figure
from _bench.guest import GuestRun, layout_of, plan_of
from _bench.load import CONDITIONS
from _bench.recipe import write_recipe
from _bench.turns import Turns
from asyncvmm.device_config import RngConfig
from asyncvmm.device_list import DeviceConfig

MEMORY_MIB = 16
KICKS = 200
"""Of one turn."""

PAUSE = 150
"""Guest instructions between an interrupt and the next kick: ring 0 may be emulated, at 0.3 million a second."""

STAMPS = 0x200000
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
_STAMPS = struct.Struct("<QQ")


@attrs.frozen
class Case:
    """One loop under one condition."""

    loop: str
    condition: str
    rounds: int


@attrs.frozen
class Ways:
    """Both ways: microseconds from kick to handler on the loop, and from the loop's write to the guest's handler."""

    kicks: Turns = attrs.field(factory=Turns)
    interrupts: Turns = attrs.field(factory=Turns)


async def measure(bench: Bench) -> list[Figure]:
    """kick_to_loop and loop_to_interrupt, on both loops, idle and busy."""
    rounds = {"idle": bench.rounds(10, 2), "busy": bench.rounds(3, 1)}
    cases = [Case(loop, condition, rounds[condition]) for condition in CONDITIONS for loop in LOOPS]
    # A thread of its own, because this one's loop is running already.
    found = [(case, await anyio.to_thread.run_sync(partial(_measure, bench, case))) for case in cases]
    return [figure for case, ways in found for figure in _figures(case, ways)]


def _measure(bench: Bench, case: Case) -> Ways:
    ours, bare = (build_guest(bench, "kicks", DRIVER=d, KICKS=KICKS, PAUSE=PAUSE, STAMPS=STAMPS) for d in (1, 0))
    recipe = write_recipe(bench.cache / f"{bare.name}.recipe", layout_of(bare, MEMORY_MIB), MEMORY_MIB << 20)
    floor = build_floor(bench, "floor_kick")
    ways = Ways()
    with CONDITIONS[case.condition](), asyncio.Runner(loop_factory=LOOPS[case.loop]) as runner:
        for _ in range(case.rounds):
            kicks, interrupts = runner.run(_ours(ours))
            ways.kicks.ours.extend(kicks)
            ways.interrupts.ours.extend(interrupts)
            kicks, interrupts = _floor(floor, recipe)
            ways.kicks.peer.extend(kicks)
            ways.interrupts.peer.extend(interrupts)
    return ways


@attrs.define
class Watched:
    """The entropy device of a run, its work and its interrupts stamped."""

    run: GuestRun
    worked: list[tuple[int, int, int]] = attrs.field(factory=list)
    interrupted: list[int] = attrs.field(factory=list)

    def watch(self, slot: Any) -> None:
        """``slot`` is a VirtioSlot."""
        work, interrupt = slot.device.process, slot.transport._interrupt
        memory = slot.transport._memory

        def stamped_work(index: int) -> bool:
            self.worked.append((time.monotonic_ns(), *_STAMPS.unpack(memory.read(STAMPS, _STAMPS.size))))
            return bool(work(index))

        def stamped_interrupt() -> None:
            self.interrupted.append(time.monotonic_ns())
            interrupt()

        slot.device.process, slot.transport._interrupt = stamped_work, stamped_interrupt

    def ways(self) -> tuple[list[float], list[float]]:
        """Both ways' microseconds. Raises Skipped where KVM does not say how its guest's counter stands."""
        kicks = [(at - self._host(tsc)) / 1000 for at, tsc, _ in self.worked[:KICKS]]
        handlers = [self._host(tsc) for _, _, tsc in self.worked[1 : KICKS + 1]]
        interrupts = [(at - written) / 1000 for at, written in zip(handlers, self.interrupted, strict=False)]
        return kicks, interrupts

    def _host(self, tsc: int) -> int:
        instant = self.run.machine.guest_instant(tsc)
        if instant is None:
            raise Skipped("KVM does not say how the guest's time-stamp counter stands to the host's")
        return instant[0]


async def _ours(guest: Path) -> tuple[list[float], list[float]]:
    """One guest's kicks, and the interrupts they had for an answer."""
    plan = attrs.evolve(plan_of(guest, MEMORY_MIB), devices=DeviceConfig(rng=RngConfig()))
    run = GuestRun(plan)
    watched = Watched(run)
    try:
        await run.start()
        devices = run.machine._devices
        assert devices is not None
        watched.watch(devices.slots[0])
        await run.ended
        await asyncio.sleep(0.02)  # the kick before its end is still on its way
        return watched.ways()
    finally:
        await run.stop()


def _floor(floor: Path, recipe: Path) -> tuple[list[float], list[float]]:
    words = [str(floor), str(recipe), str(MEMORY_MIB), hex(STAMPS), str(KICKS)]
    done = subprocess.run(words, input="go\n", capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 2:
        raise Skipped(f"the C floor failed: {done.stdout}{done.stderr}")
    kicks, interrupts = ([int(word) / 1000 for word in line.split()] for line in lines)
    return kicks, interrupts


def _figures(case: Case, ways: Ways) -> list[Figure]:
    return [
        Figure(
            name=name,
            unit="us",
            ours=turns.ours,
            peer_name="C thread in read() and write()",
            peer=turns.peer,
            conditions={"python_thread": case.condition, "loop": case.loop},
            detail={"kicks_per_turn": KICKS},
        )
        for name, turns in (("kick_to_loop", ways.kicks), ("loop_to_interrupt", ways.interrupts))
    ]
