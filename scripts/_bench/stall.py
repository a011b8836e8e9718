"""The longest time for which a boot kept the loop from turning, beside the same loop with nothing to do.

A coroutine sleeps for a millisecond over and over; how much longer a sleep took is a stall. The peer says what the host
itself adds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from _bench.bench import Bench
from _bench.build import build_guest
from _bench.figure import Figure, Target
from _bench.toyvm import toy_vm
from _bench.turns import take_turns_async
from asyncvmm.config import VMConfig
from asyncvmm.errors import AsyncVMMError
from asyncvmm.vm import VM

TICK_S = 0.001
MEMORY_MIB = 256
Work = Callable[[], Awaitable[None]]


async def measure(bench: Bench) -> list[Figure]:
    """loop_stall for the toy guest on KVM and for the default image on QEMU."""
    guest = build_guest(bench, "toy")
    figures = [await _measure("toy guest on KVM", lambda: _boot_toy(guest), 0.05, bench.rounds(30, 5))]
    try:
        figures.append(await _measure("default image on QEMU", _boot_linux, 2.0, bench.rounds(3, 1)))
    except AsyncVMMError as reason:
        bench.say(f"loop_stall of a Linux on QEMU: not measured: {reason}")
    return figures


async def _boot_toy(guest: Path) -> None:
    async with toy_vm(guest, MEMORY_MIB, until_ready=True):
        pass


async def _boot_linux() -> None:
    async with VM(VMConfig(memory_mib=MEMORY_MIB, accel="qemu")) as vm:
        await vm.boot()


async def _measure(guest: str, boot: Work, idle_s: float, rounds: int) -> Figure:
    turns = await take_turns_async(
        lambda: _longest_stall(boot), lambda: _longest_stall(lambda: asyncio.sleep(idle_s)), rounds
    )
    return Figure(
        name="loop_stall",
        unit="ms",
        ours=turns.ours,
        peer_name="the loop with nothing to do",
        peer=turns.peer,
        target=Target("ours", "<=", 20.0),
        conditions={"python_thread": "idle", "guest": guest, "memory_mib": MEMORY_MIB},
        detail={"longest_of_all": max(turns.ours)},
    )


async def _longest_stall(work: Work) -> float:
    """Milliseconds of the longest stall from before ``work`` to after it, its teardown included."""
    stalls: list[float] = []
    ticker = asyncio.ensure_future(_tick(stalls))
    await asyncio.sleep(0)
    try:
        await work()
        await asyncio.sleep(2 * TICK_S)
    finally:
        ticker.cancel()
        await asyncio.wait([ticker])
    return max(stalls, default=0.0)


async def _tick(stalls: list[float]) -> None:
    while True:
        begin = time.monotonic_ns()
        await asyncio.sleep(TICK_S)
        stalls.append((time.monotonic_ns() - begin) / 1e6 - TICK_S * 1000)
