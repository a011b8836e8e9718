"""From the library call to a toy guest's first line of output, beside QEMU from exec, with the same memory.

Ours is what a program with a running loop pays: ``VM(...)``, ``boot()``, and the line in a coroutine's hand.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from _bench.bench import Bench
from _bench.build import build_guest
from _bench.figure import Figure, Target
from _bench.qemu import QemuPeer
from _bench.toyvm import toy_vm
from _bench.turns import Turns, take_turns_async

MEMORY_MIB = 256


async def measure(bench: Bench) -> list[Figure]:
    """toy_first_line beside QEMU on KVM and on TCG."""
    guest = build_guest(bench, "toy")
    figures = []
    for accel in ("kvm", "tcg"):
        turns = await take_turns_async(lambda: _ours(guest), _qemu(guest, accel), bench.rounds(20, 4))
        figures.append(_figure(accel, turns))
    return figures


async def _ours(guest: Path) -> float:
    begin = time.monotonic_ns()
    async with toy_vm(guest, MEMORY_MIB, until_ready=False) as vm:
        await _first_line(vm.console.subscribe().__anext__)
        return float(time.monotonic_ns() - begin)


def _qemu(guest: Path, accel: str) -> Callable[[], Awaitable[float]]:
    async def sample() -> float:
        peer = QemuPeer(guest, accel, MEMORY_MIB)
        begin = peer.start()
        try:
            await _first_line(peer.read)
            return float(time.monotonic_ns() - begin)
        finally:
            peer.stop()

    return sample


async def _first_line(read: Callable[[], Awaitable[bytes]]) -> None:
    while b"\n" not in await read():
        pass


def _figure(accel: str, turns: Turns) -> Figure:
    return Figure(
        name="toy_first_line",
        unit="ms",
        ours=[value / 1e6 for value in turns.ours],
        peer_name=f"QEMU microvm on {accel.upper()}, from exec",
        peer=[value / 1e6 for value in turns.peer],
        target=Target("ratio", "<=", 0.25),
        conditions={"python_thread": "idle", "memory_mib": MEMORY_MIB},
    )
