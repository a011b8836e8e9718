"""How a QEMU machine ends, by whatever end it comes, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.errors import StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.cancelling import cancel_work
from tests.support.holdings import children
from tests.support.qemu_machine import DEBUG_EXIT, PATIENCE_S, holdings, running, start_cancelled

pytestmark = pytest.mark.anyio


async def test_a_qemu_killed_from_outside_is_reported_with_how_it_ended(plan: BootPlan, qemu: QemuBinary) -> None:
    before = children(os.getpid())
    async with running(plan, qemu) as (machine, witness):
        (pid,) = children(os.getpid()) - before
        os.kill(pid, signal.SIGKILL)
        stopped = await witness.until_stopped()
        assert stopped.reason == "machine"
        assert "SIGKILL" in stopped.detail
        with pytest.raises(StateError):
            await machine.write("console", b"x")
        with pytest.raises(StateError):
            await machine.pause()


async def test_stopping_leaves_nothing_and_is_no_news(plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.stop()
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go
        progress = machine.progress()
        await machine.stop()
        assert machine.progress() == progress > 0
        assert not witness.stops


async def test_a_guest_that_ended_leaves_nothing_even_before_stop(plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        await machine.write("console", DEBUG_EXIT)
        await witness.until_stopped()
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_machine_may_be_stopped_by_another_task_and_by_several(plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, _):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(machine.stop)
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_writer_waiting_for_a_guest_that_does_not_read_is_woken_by_the_end(
    plan: BootPlan, qemu: QemuBinary
) -> None:
    async with running(plan, qemu) as (machine, _):
        await machine.pause()
        writer = asyncio.ensure_future(machine.write("console", b"x" * 10_000_000))
        await anyio.sleep(0.05)
        assert not writer.done()
        await machine.stop()
        with anyio.fail_after(PATIENCE_S), pytest.raises(StateError, match="has ended"):
            await writer


async def test_a_cancelled_write_leaves_the_line_usable(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await machine.pause()
        with anyio.move_on_after(0.05) as scope:
            await machine.write("console", b"." * 10_000_000)
        assert scope.cancelled_caught
        await machine.resume()
        with anyio.fail_after(PATIENCE_S):
            await machine.write("console", b"!")
        await witness.until_said("console", b"...")


@pytest.mark.parametrize("turns", range(0, 60, 6))
async def test_a_start_cancelled_by_its_scope_leaves_nothing(plan: BootPlan, qemu: QemuBinary, turns: int) -> None:
    plan = attrs.evolve(plan, appended=b"x" * 100_000)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    async with anyio.create_task_group() as group:
        group.start_soon(machine.start)
        for _ in range(turns):
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    await machine.stop()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


@pytest.mark.parametrize("turns", range(12))
async def test_a_start_cancelled_by_its_task_leaves_nothing(plan: BootPlan, qemu: QemuBinary, turns: int) -> None:
    plan = attrs.evolve(plan, appended=b"x" * 100_000)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    await start_cancelled(machine, turns)
    await machine.stop()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_stop_cancelled_still_ends_everything_and_is_cancelled(plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, _):
        await cancel_work(1, machine.stop())
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


PARENT = """
import asyncio, sys
from pathlib import Path
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline

async def main():
    plan = BootPlan(name="orphan", memory_mib=32, vcpus=1, kernel=Path(sys.argv[1]), initrd=None)
    await QemuMachine(plan, Timeline(), lambda effects: None).start()
    print(*[task.joinpath("children").read_text() for task in Path("/proc/self/task").iterdir()], flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture
def parent(toy_guest: Path, qemu: QemuBinary) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, str(toy_guest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


async def test_a_parent_that_is_killed_takes_qemu_with_it(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    pidfd = os.pidfd_open(int(await anyio.to_thread.run_sync(parent.stdout.readline)))
    try:
        parent.kill()
        with anyio.fail_after(PATIENCE_S):
            await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)
