"""How late a coroutine that awaits the guest's lines gets each: from the guest's newline to the coroutine resumed.

The newline is stamped on the vCPU's thread as the guest writes it. The floor is a C program that writes its clock into
a pipe, to a coroutine that does nothing but take it. On asyncio's loop and on uvloop.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio.to_thread
import attrs
import uvloop

from _bench.bench import Bench
from _bench.build import build_floor, build_guest
from _bench.figure import Figure
from _bench.load import CONDITIONS
from _bench.toyvm import toy_vm
from _bench.turns import Turns
from asyncvmm.errors import GuestError
from asyncvmm.events.types import SerialLine

MEMORY_MIB = 16
LINES = 100
"""Lines in one turn."""
TSC_TICKS = 2_000_000
PERIOD_US = 1000
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@attrs.frozen
class Case:
    """One loop under one condition."""

    loop: str
    condition: str
    rounds: int


async def measure(bench: Bench) -> list[Figure]:
    """newline_to_coroutine for both loops, idle and busy."""
    guest = build_guest(bench, "lines", LINES=LINES, TICKS=TSC_TICKS)
    floor = build_floor(bench, "floor_newline")
    rounds = {"idle": bench.rounds(5, 1), "busy": bench.rounds(2, 1)}
    cases = [Case(loop, condition, rounds[condition]) for condition in CONDITIONS for loop in LOOPS]
    # A thread of its own, because this one's loop is running already.
    return [await anyio.to_thread.run_sync(partial(_measure, case, guest, floor)) for case in cases]


def _measure(case: Case, guest: Path, floor: Path) -> Figure:
    turns = Turns()
    with CONDITIONS[case.condition](), asyncio.Runner(loop_factory=LOOPS[case.loop]) as runner:
        for _ in range(case.rounds):
            turns.ours.extend(runner.run(_ours(guest)))
            turns.peer.extend(runner.run(_floor(floor)))
    return Figure(
        name="newline_to_coroutine",
        unit="us",
        ours=turns.ours,
        peer_name="C program writing its clock into a pipe",
        peer=turns.peer,
        conditions={"python_thread": case.condition, "loop": case.loop},
        detail={"lines_per_turn": LINES},
    )


async def _ours(guest: Path) -> list[float]:
    """Microseconds of each line's way."""
    delays: list[float] = []
    async with toy_vm(guest, MEMORY_MIB, until_ready=False, serial_lines=True) as vm:
        with suppress(GuestError):  # the guest ends itself
            async for event in vm.events.subscribe((SerialLine,)):
                delays.append((time.monotonic_ns() - vm.timeline.start_ns - event.t_ns) / 1000)
    return delays


async def _floor(floor: Path) -> list[float]:
    delays: list[float] = []
    words = (str(floor), str(LINES), str(PERIOD_US))
    child = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    with suppress(asyncio.IncompleteReadError):
        while True:
            (stamp,) = struct.unpack("<Q", await child.stdout.readexactly(8))
            delays.append((time.monotonic_ns() - stamp) / 1000)
    await child.wait()
    return delays
