"""The same as test_restoring.py, by machines on an event loop: whatever the moment, nothing is lost or comes twice."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.launch import PreparedLaunch, prepare_launch
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.saved import MemoryLayer, RestorePlan
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.kvm.conftest import IN_LAB, Run

pytestmark = pytest.mark.anyio

MOMENTS = int(os.environ.get("ASYNCVMM_MOMENTS", "5" if IN_LAB else "25"))
LETTERS = bytes(range(0x30, 0x70))
MEMORY_BYTES = 4 << 20
MOST_RUN_S = 0.004
AHEAD = 3

Guest = Callable[[str], Path]


class Counting:
    """A guest of test_restoring.py, and what it must have said by now."""

    def __init__(self, kernel: Path, name: str) -> None:
        self.is_pulse = name.startswith("pulse")
        self.vcpus = 2 if self.is_pulse else 1
        self.fed = 0
        self._kernel = kernel

    def run(self, earlier: Run | None = None) -> Run:
        """One more machine for it, whose output goes on from the earlier one's."""
        run = Run()
        if earlier is not None:
            run.effects = list(earlier.effects)
        plan = BootPlan(name="kvmtest", memory_mib=4, vcpus=self.vcpus, kernel=self._kernel, initrd=None)
        run.machine = KvmMachine(plan, Timeline(), run.take)
        return run

    async def feed(self, run: Run) -> None:
        """Keep some bytes ahead of the one that echoes them."""
        while self.is_pulse and self.fed < len(run.output) - 1 + AHEAD:
            await run.machine.write("console", bytes([self.fed % 256]))
            self.fed += 1

    def check(self, run: Run) -> None:
        """Everything once, in order."""
        output = run.output
        if self.is_pulse:
            assert output[1:] == bytes(number % 256 for number in range(len(output) - 1))
        else:
            assert output == (LETTERS * (len(output) // len(LETTERS) + 1))[: len(output)]

    async def goes_on(self, run: Run) -> None:
        """It says what comes next."""
        goal = len(run.output) + 2
        await self.feed(run)
        await run.until(lambda: run.ends or len(run.output) >= goal)
        assert not run.ends, run.ends
        self.check(run)


@pytest.fixture(autouse=True)
def known_host() -> None:
    """What the first save of a process asks is asked before a loop runs: here it is not measured."""
    host_state()
    for module in ("restoring", "saving"):
        import_module(f"asyncvmm.machine.kvm.{module}")


async def save(run: Run) -> RestorePlan:
    """Whole, into memory."""
    fd = os.memfd_create("saved")
    saved = await run.machine.save(MemoryWriter(fd, MEMORY_BYTES))
    return RestorePlan(saved=saved, layers=(MemoryLayer(fd=fd, map=saved.memory),))


async def restore(run: Run, plan: RestorePlan, _: bool) -> None:
    """Made, and held."""
    await run.machine.restore(plan)


async def launch(run: Run, plan: RestorePlan, enters: bool) -> None:
    """Made by a runner, which may have entered the guest by the time that the machine is there."""

    def prepare() -> PreparedLaunch:
        prepared = prepare_launch(plan, in_shell=False)
        while not runner.any_idle():
            runner.make_one()
            time.sleep(0.001)
        assert prepared is not None
        return prepared

    launched = (await in_thread(prepare)).begin(enters)
    assert launched is not None
    await run.machine.restore(plan, launch=launched)
    assert launched.opened == enters


async def go_through_moments(counting: Counting, restore: Callable[[Run, RestorePlan, bool], Awaitable[None]]) -> None:
    """Save and stop it at one moment after another, and have what was saved go on."""
    chance = random.Random(7)
    run = counting.run()
    try:
        await run.machine.start()
        await run.until(lambda: run.output)
        for _ in range(MOMENTS):
            await counting.feed(run)
            await anyio.sleep(chance.uniform(0, MOST_RUN_S))
            await run.machine.pause()
            plan = await save(run)
            restored = counting.run(run)
            await run.machine.stop()
            restored.effects[:] = run.effects
            run, enters = restored, chance.random() < 0.5
            await restore(run, plan, enters)
            os.close(plan.layers[0].fd)
            if not enters:
                await counting.feed(run)  # while it is still held
            await run.machine.resume()
            counting.check(run)
        await counting.goes_on(run)
    finally:
        await run.machine.stop()


@pytest.mark.parametrize("name", ["tally", "pulse-deadline", "pulse-one-shot"])
async def test_whatever_the_moment_nothing_is_lost_and_nothing_comes_twice(name: str, guest: Guest) -> None:
    await go_through_moments(Counting(guest(name), name), restore)


async def test_nor_where_the_guest_is_launched(guest: Guest) -> None:
    await go_through_moments(Counting(guest("tally"), "tally"), launch)


async def test_output_that_a_snapshot_still_has_is_told(guest: Guest) -> None:
    counting = Counting(guest("tally"), "tally")
    run = counting.run()
    try:
        await run.machine.start()
        await run.until(lambda: run.output)
        await run.machine.pause()
        plan = await save(run)
    finally:
        await run.machine.stop()
    board = decode(plan.saved.sections["board"])
    board["console"]["output"] = b"unheard\n"
    sections = {**plan.saved.sections, "board": encode(board)}
    plan = attrs.evolve(plan, saved=attrs.evolve(plan.saved, sections=sections))
    restored = counting.run()
    try:
        await restored.machine.restore(plan)
        await restored.said(b"unheard\n")
    finally:
        await restored.machine.stop()
        os.close(plan.layers[0].fd)
