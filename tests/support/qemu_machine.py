"""A QEMU machine driven directly, without a VM around it: what it tells, and what this process holds because of it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs

from asyncvmm.effects import Effect, Port, SerialOutput, Stopped
from asyncvmm.guest.image import Image, find_image
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.machine.qemu.spawning import THREAD_NAME
from asyncvmm.timing.timeline import Timeline
from tests.support.holdings import children
from tests.support.requirements import require

PATIENCE_S = 60

TOY_MIB = 32

DEBUG_EXIT = b"\x04"
"""Sent to the toy's console: it writes to the debug-exit port."""

SOME_TSC_KHZ = 2_000_000
"""For guests that ask for their frequency, and do nothing with it."""


@attrs.define
class Witness:
    """Takes a machine's effects and lets a test wait for them."""

    effects: list[Effect] = attrs.field(factory=list)
    news: asyncio.Event = attrs.field(factory=asyncio.Event)

    def take(self, effects: Sequence[Effect]) -> None:
        self.effects += effects
        self.news.set()

    def output(self, port: Port) -> bytes:
        return b"".join(e.data for e in self.effects if isinstance(e, SerialOutput) and e.port == port)

    @property
    def stops(self) -> list[Stopped]:
        return [effect for effect in self.effects if isinstance(effect, Stopped)]

    async def until(self, condition: Callable[[], object]) -> None:
        with anyio.fail_after(PATIENCE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def until_stopped(self) -> Stopped:
        await self.until(lambda: self.stops)
        return self.stops[0]

    async def until_said(self, port: Port, text: bytes) -> None:
        await self.until(lambda: text in self.output(port))


def descriptors() -> dict[str, str]:
    """This process's descriptors, by number."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found[entry.name] = os.readlink(entry)
    return found


def threads() -> set[str]:
    """Its threads. Idle worker threads are anyio's and end by themselves; the one that starts children is for good."""
    return {thread.name for thread in threading.enumerate() if "worker thread" not in thread.name} - {THREAD_NAME}


def holdings() -> set[object]:
    """Everything that it holds."""
    tasks = {("task", number) for number in range(len(asyncio.all_tasks()))}
    return {*children(os.getpid()), *descriptors().items(), *threads(), *tasks}


@asynccontextmanager
async def running(plan: BootPlan, qemu: QemuBinary, **options: Any) -> AsyncIterator[tuple[QemuMachine, Witness]]:
    """A machine that is started, and stopped at the end."""
    witness = Witness()
    machine = QemuMachine(plan, Timeline(), witness.take, qemu=qemu, **options)
    await machine.start()
    try:
        yield machine, witness
    finally:
        await machine.stop()


async def start_cancelled(machine: QemuMachine, turns: int) -> None:
    """Start it in a task that is cancelled after so many turns of the loop, several times."""
    task = asyncio.ensure_future(machine.start())
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    for _ in range(3):
        task.cancel()
        await anyio.lowlevel.checkpoint()
    with suppress(asyncio.CancelledError):
        await task


def default_image() -> Image:
    """The guest image; skips the test where there is none."""
    require("image")
    return find_image("default")


def tsc_khz() -> int | None:
    """The host's TSC frequency as its kernel prints it, which is near enough for a test."""
    match = re.search(r"^cpu MHz\s*: ([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return int(float(match[1]) * 1000) if match else None
