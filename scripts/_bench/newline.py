"""How late a coroutine that awaits the guest's lines gets each: from the guest's newline to the coroutine resumed.

The newline is stamped on the vCPU's thread as the guest writes it. On asyncio's loop and on uvloop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio.to_thread
import uvloop

from _bench.bench import Bench
from _bench.build import build_guest
from _bench.figure import Figure
from _bench.load import CONDITIONS
from _bench.toyvm import toy_vm
from asyncvmm.errors import GuestError
from asyncvmm.events.types import SerialLine

MEMORY_MIB = 16
TSC_TICKS = 2_000_000
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


async def measure(bench: Bench) -> list[Figure]:
    """newline_to_coroutine for both loops, idle and busy."""
    figures = []
    for condition, lines in (("idle", bench.rounds(500, 50)), ("busy", bench.rounds(200, 20))):
        guest = build_guest(bench, "lines", LINES=lines, TICKS=TSC_TICKS)
        for loop, factory in LOOPS.items():
            delays = await anyio.to_thread.run_sync(partial(_on_loop, factory, guest, condition))
            figures.append(_figure(loop, condition, delays))
    return figures


def _on_loop(factory: Callable[[], asyncio.AbstractEventLoop], guest: Path, condition: str) -> list[float]:
    with CONDITIONS[condition](), asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_delays(guest))


async def _delays(guest: Path) -> list[float]:
    """Microseconds of each line's way."""
    delays: list[float] = []
    async with toy_vm(guest, MEMORY_MIB, until_ready=False, serial_lines=True) as vm:
        try:
            async for event in vm.events.subscribe((SerialLine,)):
                delays.append((time.monotonic_ns() - vm.timeline.start_ns - event.t_ns) / 1000)
        except GuestError:
            pass  # the guest ends itself
    return delays


def _figure(loop: str, condition: str, delays: list[float]) -> Figure:
    return Figure(
        name="newline_to_coroutine",
        unit="us",
        ours=delays,
        conditions={"python_thread": condition, "loop": loop},
    )
