"""Pausing, resuming, stopping, cancelling: at any moment, from any state, with nothing lost and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.errors import StateError
from asyncvmm.machine.base import Evidence

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Make, Resources, Run

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that nothing else in the process has: its mapping is found by it."""


async def test_a_spinning_guest_is_paused_and_resumed(boot: Boot) -> None:
    async with boot("spin") as run:
        await run.said(b".")
        for _ in range(5):
            await run.machine.pause()
            await run.machine.resume()


async def test_a_halted_guest_is_paused_and_resumed(boot: Boot) -> None:
    async with boot("halt") as run:
        await run.said(b".")
        for _ in range(5):
            await run.machine.pause()
            await run.machine.resume()


async def test_a_guest_that_spins_in_ring_3_is_paused_and_resumed(boot: Boot) -> None:
    async with boot("ring3") as run:
        await run.machine.write("console", b"g")
        await run.said(b"3s")
        for _ in range(5):
            await run.machine.pause()
            evidence = await run.machine.evidence()
            assert evidence.rip is not None
            assert 0x100000 < evidence.rip < 0x101000
            await run.machine.resume()


async def test_a_paused_guest_makes_no_exits_and_a_resumed_one_goes_on(boot: Boot) -> None:
    async with boot("sequence") as run:
        await run.said(b"\x01")
        await run.machine.pause()
        paused_at = run.exits.total
        await anyio.sleep(0.02)
        assert run.exits.total == paused_at
        await run.machine.resume()
        heard = len(run.output)
        await run.until(lambda: len(run.output) > heard + 20)


async def test_hundreds_of_pauses_at_random_moments_lose_nothing(boot: Boot) -> None:
    draw = random.Random(1)
    async with boot("sequence") as run:
        for _ in range(200):
            await run.machine.pause()
            await run.machine.resume()
            if draw.random() < 0.7:
                await anyio.sleep(draw.random() * 0.002)
        heard = len(run.output)
        await run.until(lambda: len(run.output) > heard + 100)
        await run.machine.stop()
        assert run.ends == []
        assert run.output == bytes(index % 256 for index in range(len(run.output)))
        assert len(run.output) == run.count("out 0x3f8") > 100


@pytest.mark.stalls
async def test_thousands_of_orders_to_a_paused_vcpu_are_borne(boot: Boot) -> None:
    async with boot("spin") as run:
        await run.said(b".")
        await run.machine.pause()
        vm = run.machine._vm
        assert vm is not None
        for _ in range(50_000):
            vm.vcpus[0].order("pause")
        await run.machine.resume()
        await run.machine.pause()


async def test_a_paused_guest_can_be_stopped(
    boot: Boot, resources: Callable[[], Resources], nothing: Resources
) -> None:
    async with boot("spin") as run:
        await run.machine.pause()
        await run.machine.stop()
        assert resources() == nothing


@pytest.mark.parametrize("name", ["spin", "halt", "flood", "sequence", "ring3"])
async def test_a_guest_is_stopped_whatever_it_does(
    boot: Boot, resources: Callable[[], Resources], nothing: Resources, name: str
) -> None:
    async with boot(name, memory_mib=MEMORY_MIB, vcpus=2) as run:
        if name == "ring3":
            await run.machine.write("console", b"g")
        await run.until(lambda: run.output)
        held = resources()
        assert sorted(held.threads) == ["kvmtest-vcpu0", "kvmtest-vcpu1"]
        assert held.mappings == 2 + 1
        assert set(held.descriptors) >= {"/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0"}
        await run.machine.stop()
        assert resources() == nothing
        assert run.exits.total > 0  # still known


async def test_stop_may_come_again_and_at_the_same_time(
    boot: Boot, resources: Callable[[], Resources], nothing: Resources
) -> None:
    async with boot("flood", memory_mib=MEMORY_MIB) as run:
        await run.said(b"x")
        left: list[Resources] = []

        async def stop() -> None:
            await run.machine.stop()
            left.append(resources())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(stop)
        await stop()
        assert left == [nothing] * 4


async def test_twenty_machines_one_after_the_other_leave_nothing(
    make: Make, resources: Callable[[], Resources], nothing: Resources
) -> None:
    for _ in range(20):
        run = make("spin", memory_mib=MEMORY_MIB)
        await run.machine.start()
        await run.machine.stop()
        assert resources() == nothing


async def test_machines_side_by_side_do_not_disturb_each_other(make: Make) -> None:
    runs = [make("sequence"), make("output"), make("sequence")]
    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(run.machine.start)
    assert (await runs[1].end()).code == 0
    await runs[0].machine.stop()
    heard = len(runs[2].output)
    await runs[2].until(lambda: len(runs[2].output) > heard + 10)
    await runs[2].machine.stop()
    await runs[1].machine.stop()
    assert len(runs[1].output) == 20_000


async def test_a_stop_while_it_starts_ends_the_start(
    make: Make, resources: Callable[[], Resources], nothing: Resources
) -> None:
    for delay in _moments():
        run = make("spin", memory_mib=MEMORY_MIB)
        starting = asyncio.ensure_future(run.machine.start())
        await _wait(delay)
        await run.machine.stop()
        assert resources() == nothing
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        assert outcome is None or isinstance(outcome, StateError)
        assert resources() == nothing


async def test_a_start_cancelled_at_any_moment_leaves_nothing(
    make: Make, resources: Callable[[], Resources], nothing: Resources
) -> None:
    for delay in _moments():
        run = make("spin", memory_mib=MEMORY_MIB)
        starting = asyncio.ensure_future(run.machine.start())
        await _wait(delay)
        started = starting.done()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if started:
            await run.machine.stop()
        assert resources() == nothing


async def test_a_start_in_a_cancelled_scope_leaves_nothing(
    make: Make, resources: Callable[[], Resources], nothing: Resources
) -> None:
    for delay in _moments():
        run = make("spin", memory_mib=MEMORY_MIB)
        with anyio.move_on_after(delay):
            await run.machine.start()
            await anyio.sleep_forever()
        await run.machine.stop()
        assert resources() == nothing


async def test_a_cancelled_stop_still_frees_everything(
    make: Make, resources: Callable[[], Resources], nothing: Resources
) -> None:
    run = make("spin", memory_mib=MEMORY_MIB)
    await run.machine.start()
    stopping = asyncio.ensure_future(run.machine.stop())
    await anyio.lowlevel.checkpoint()
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await run.machine.stop()
    assert resources() == nothing


async def test_a_machine_that_was_never_started_can_be_stopped_and_never_starts_after_it(make: Make) -> None:
    run = make("spin")
    await run.machine.stop()
    with pytest.raises(StateError):
        await run.machine.start()


async def test_a_machine_starts_once(boot: Boot) -> None:
    async with boot("spin") as run:
        with pytest.raises(StateError):
            await run.machine.start()
        await run.said(b".")


async def test_a_stopped_machine_refuses_what_needs_a_running_one(boot: Boot) -> None:
    async with boot("spin") as run:
        await run.machine.stop()
        for call in (run.machine.pause, run.machine.resume, run.machine.request_shutdown):
            with pytest.raises(StateError):
                await call()
        assert await run.machine.evidence() == Evidence()
        assert run.machine.progress() == 0


async def test_evidence_is_given_while_the_machine_is_being_stopped(boot: Boot) -> None:
    async with boot("spin") as run:
        found: list[Evidence] = []

        async def ask(run: Run) -> None:
            found.append(await run.machine.evidence())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, run)
            tasks.start_soon(run.machine.stop)
        assert len(found) == 1


async def test_a_guest_that_ended_can_still_be_asked_and_stopped(boot: Boot) -> None:
    async with boot("toy") as run:
        await run.end()
        await run.machine.pause()
        evidence = await run.machine.evidence()
        assert evidence.last_exit == "IO"
        assert evidence.rip is not None


def test_a_vcpu_ordered_to_stop_before_its_thread_is_ready_does_not_kill_the_process() -> None:
    """In a process of its own, stopped from its thread's first call on: the signal's default action would end it."""
    script = """
import threading
from asyncvmm.bus import Bus
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline

def stop_at_once(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "_main":
        frame.f_locals["self"].order("stop")

vm = KvmVm(blueprint(2 << 20, 1), Timeline())
threading.setprofile(stop_at_once)
vm.vcpus[0].start("early", Bus(), print)
vm.vcpus[0].join()
vm.close()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=100, check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def _moments() -> list[float]:
    """Delays that fall before, into and behind the start, which takes some milliseconds."""
    return [0.0, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.015, 0.03]


async def _wait(delay: float) -> None:
    await (anyio.sleep(delay) if delay else anyio.lowlevel.checkpoint())
