"""What telemetry adds to a boot: events as JSON lines in a file, profiles and all, beside a boot nobody listens to.

Three ways. As the clock says, boots in turns: a guest of seconds drowns it in its own noise, a toy guest of a few
milliseconds shows it whole, the opening of the file and code that runs for the first time included. As counted: the
boot's events times what one of many costs (events.to_file), in percent of the boot; the few of a boot cost more each.
As transferred: what the clock said of the toy, in percent of the boot of a Linux, which has no more events. The target
is for Linux: no workload's boot is as short as the toy's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import median

from _bench.bench import Bench
from _bench.build import build_guest
from _bench.events import BATCH, anew, to_file
from _bench.figure import Figure, Target
from _bench.turns import Turns, take_turns_async
from asyncvmm.config import VMConfig
from asyncvmm.errors import AsyncVMMError
from asyncvmm.vm import VM

MEMORY_MIB = 256
TOY = "toy guest on KVM"
LINUX = "default image on QEMU"
Boot = Callable[[Path | None], Awaitable[float]]


async def measure(bench: Bench) -> list[Figure]:
    """telemetry_cost of the toy guest on KVM and of the default image on QEMU."""
    toy = VMConfig(kernel=build_guest(bench, "toy"), cmdline="", memory_mib=MEMORY_MIB, accel="kvm")
    linux = VMConfig(memory_mib=MEMORY_MIB, accel="qemu")
    figures: list[Figure] = []
    turns: dict[str, Turns] = {}
    for guest, config, rounds in ((TOY, toy, bench.rounds(60, 5)), (LINUX, linux, bench.rounds(5, 1))):
        try:
            turns[guest], counted = await _measure(guest, partial(_boot, config), rounds)
        except AsyncVMMError as reason:
            bench.say(f"telemetry_cost of the {guest}: not measured: {reason}")
        else:
            figures += [_clocked(guest, turns[guest]), counted]
    if len(turns) == len((TOY, LINUX)):
        figures.append(_transferred(turns[TOY], median(turns[LINUX].peer)))
    return figures


async def _measure(guest: str, boot: Boot, rounds: int) -> tuple[Turns, Figure]:
    with tempfile.TemporaryDirectory(prefix="asyncvmm-bench-") as directory:
        path = Path(directory) / "boot.jsonl"
        turns = await take_turns_async(lambda: boot(anew(path)), lambda: boot(None), rounds)
        events = path.read_bytes().count(b"\n")
        costs = [await to_file(anew(path), 10 * BATCH) for _ in range(rounds)]
    return turns, _counted(guest, events, costs, median(turns.peer))


async def _boot(config: VMConfig, path: Path | None) -> float:
    """Milliseconds from making the VM to a ready guest; its end is not counted."""
    begin = time.monotonic_ns()
    async with VM(config) as vm:
        if path is not None:
            vm.stream_to(path)
        await vm.boot()
        return (time.monotonic_ns() - begin) / 1e6


def _clocked(guest: str, turns: Turns) -> Figure:
    return Figure(
        name="telemetry_cost",
        unit="ms",
        ours=turns.ours,
        peer_name="a boot nobody listens to",
        peer=turns.peer,
        conditions={"case": "clocked", "guest": guest, "memory_mib": MEMORY_MIB},
    )


def _counted(guest: str, events: int, costs: list[float], boot_ms: float) -> Figure:
    return Figure(
        name="telemetry_cost",
        unit="%",
        ours=[events * cost / (boot_ms * 1e6) * 100 for cost in costs],
        target=Target("ours", "<=", 1.0) if guest == LINUX else None,
        conditions={"case": "counted", "guest": guest, "memory_mib": MEMORY_MIB},
        detail={"events": events, "event_ns": round(median(costs)), "boot_ms": round(boot_ms, 3)},
    )


def _transferred(toy: Turns, boot_ms: float) -> Figure:
    differences = [on - off for on, off in zip(toy.ours, toy.peer, strict=True)]
    return Figure(
        name="telemetry_cost",
        unit="%",
        ours=[difference / boot_ms * 100 for difference in differences],
        target=Target("ours", "<=", 1.0),
        conditions={"case": "transferred", "guest": LINUX, "memory_mib": MEMORY_MIB},
        detail={"toy_difference_ms": round(median(differences), 3), "boot_ms": round(boot_ms, 3)},
    )
