"""Polled serial output (LSR read until THRE, THR write) in bytes a second, beside QEMU's isa-serial on the same KVM.

Both as a coroutine of this process sees it: from the arrival of the guest's first line, which is empty, to the arrival
of its last byte. So the busy thread stands in the reader's way on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from _bench.bench import Bench, Skipped
from _bench.build import build_guest
from _bench.figure import Figure, Target
from _bench.load import CONDITIONS
from _bench.qemu import QemuPeer
from _bench.toyvm import toy_vm
from _bench.turns import Turns, take_turns_async
from asyncvmm.errors import GuestError

BYTES = 20_000
MEMORY_MIB = 16


async def measure(bench: Bench) -> list[Figure]:
    """serial_polled_bytes_per_second, idle and busy."""
    guest = build_guest(bench, "polled", BYTES=BYTES)
    figures = []
    for condition, load in CONDITIONS.items():
        with load():
            turns = await take_turns_async(lambda: _ours(guest), lambda: _qemu(guest), bench.rounds(5, 1), warm_up=0)
        figures.append(_figure(condition, turns))
    return figures


async def _ours(guest: Path) -> float:
    async with toy_vm(guest, MEMORY_MIB, until_ready=False) as vm:
        return await _rate(vm.console.subscribe().__anext__)


async def _qemu(guest: Path) -> float:
    peer = QemuPeer(guest, "kvm", MEMORY_MIB)
    peer.start()
    try:
        return await _rate(peer.read)
    finally:
        peer.stop()


async def _rate(read: Callable[[], Awaitable[bytes]]) -> float:
    """Bytes a second, from the piece with the first newline to the one with the last byte."""
    try:
        got = len(await read())
        begin, first = time.monotonic_ns(), got
        while got < BYTES + 1:
            piece = await read()
            if not piece:
                raise Skipped(f"the guest's output ended after {got} bytes")
            got += len(piece)
    except (StopAsyncIteration, GuestError):
        raise Skipped("the guest's output ended early") from None
    return (got - first) / (time.monotonic_ns() - begin) * 1e9


def _figure(condition: str, turns: Turns) -> Figure:
    return Figure(
        name="serial_polled_bytes_per_second",
        unit="bytes/s",
        ours=turns.ours,
        peer_name="QEMU isa-serial on KVM",
        peer=turns.peer,
        target=Target("ratio", ">=", 0.9),
        conditions={"python_thread": condition, "bytes": BYTES},
    )
