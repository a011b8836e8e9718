"""While a QEMU is being started the loop goes on, and whoever gives it up meanwhile leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.errors import AsyncVMMError, MachineError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.binary import NAME, OVERRIDE
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import PATIENCE_S, Witness, holdings, running
from tests.support.qemu_saved import Taken
from tests.support.slow_exec import SlowExec, slow_exec

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "gcc", "setpriv")]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowExec]:
    """The program that QEMU is started through is slow the next time."""
    directory = tmp_path / "bin"
    directory.mkdir()
    with slow_exec("setpriv", directory) as slow:
        monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
        yield slow


@pytest.fixture
def machine(plan: BootPlan, qemu: QemuBinary) -> QemuMachine:
    return QemuMachine(plan, Timeline(), Witness().take, qemu=qemu)


async def test_the_loop_goes_on_while_a_qemu_is_started(slow: SlowExec, plan: BootPlan, qemu: QemuBinary) -> None:
    async def let_go() -> None:
        await slow.begun()
        await slow.let_go()

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_go)
            async with running(plan, qemu) as (_, witness):
                await witness.until_said("control", b"hello control\n")


async def test_the_loop_goes_on_while_a_qemu_is_asked_what_it_is(
    plan: BootPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_exec(NAME, tmp_path) as slow, anyio.fail_after(PATIENCE_S):
        monkeypatch.setenv(OVERRIDE, str(tmp_path / NAME))
        machine = QemuMachine(plan, Timeline(), Witness().take)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(machine.prepare)
            await slow.begun()
            await slow.let_go()
        await machine.stop()


async def test_a_start_cancelled_while_its_qemu_is_started_leaves_nothing(slow: SlowExec, machine: QemuMachine) -> None:
    before = holdings()
    starting = asyncio.ensure_future(machine.start())
    with anyio.fail_after(PATIENCE_S):
        await slow.begun()
        for _ in range(3):
            starting.cancel()
            await anyio.sleep(0.01)
        assert not starting.done(), "there is a process still"
        await slow.let_go()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert not holdings() - before


async def test_a_machine_stopped_while_its_qemu_is_started_leaves_nothing(slow: SlowExec, machine: QemuMachine) -> None:
    before = holdings()
    starting = asyncio.ensure_future(machine.start())
    with anyio.fail_after(PATIENCE_S):
        await slow.begun()
        stopping = asyncio.ensure_future(machine.stop())
        await anyio.sleep(0.01)
        assert not stopping.done(), "there is a process still"
        await slow.let_go()
        await stopping
        with pytest.raises(AsyncVMMError):
            await starting
    del starting, stopping
    assert not holdings() - before


async def test_start_and_stop_both_cancelled_while_a_qemu_is_started_leave_nothing(
    slow: SlowExec, machine: QemuMachine
) -> None:
    before = holdings()
    tasks = [asyncio.ensure_future(machine.start())]
    with anyio.fail_after(PATIENCE_S):
        await slow.begun()
        tasks.append(asyncio.ensure_future(machine.stop()))
        await anyio.lowlevel.checkpoint()
        for task in tasks:
            task.cancel()
        await anyio.sleep(0.01)
        await slow.let_go()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
    del task, tasks
    assert not holdings() - before


async def test_a_qemu_that_is_lost_while_it_is_started_is_killed_as_soon_as_it_is_there(
    slow: SlowExec, machine: QemuMachine
) -> None:
    before = holdings()
    starting = asyncio.ensure_future(machine.start())
    with anyio.fail_after(PATIENCE_S):
        await slow.begun()
        assert machine._process is not None
        machine._process._channel.peer.send(b"nonsense\n")
        await anyio.sleep(0.01)
        assert not starting.done(), "there is a process still"
        await slow.let_go()
        with pytest.raises(MachineError, match="nonsense"):
            await starting
    del starting
    assert not holdings() - before


async def test_a_restore_cancelled_while_its_qemu_is_started_leaves_nothing(
    taken: Taken, slow: SlowExec, machine: QemuMachine
) -> None:
    before = holdings()
    with anyio.fail_after(PATIENCE_S), taken.file.open("rb") as file:
        restoring = asyncio.ensure_future(machine.restore(taken.plan(file.fileno())))
        await slow.begun()
        restoring.cancel()
        await anyio.sleep(0.01)
        await slow.let_go()
        with pytest.raises(asyncio.CancelledError):
            await restoring
    assert not holdings() - before


async def test_a_program_that_cannot_be_executed_is_an_error_that_says_why(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setpriv").write_bytes(b"\x7fELF of some other machine")
    (tmp_path / "setpriv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), Witness().take, qemu=qemu)
    with pytest.raises(MachineError, match="Exec format error") as caught:
        await machine.start()
    assert not caught.value.retryable
    assert not holdings() - before
