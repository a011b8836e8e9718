"""The QEMU machine with a toy guest, and once with Linux, on both event loops."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.effects import SerialOutput
from asyncvmm.errors import (
    CmdlineError,
    InitrdError,
    KernelError,
    MachineError,
    StateError,
)
from asyncvmm.guest.archive import workload_archive
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.holdings import children
from tests.support.qemu_machine import PATIENCE_S, Witness, default_image, holdings, running, tsc_khz
from tests.support.requirements import require

pytestmark = pytest.mark.anyio

DEBUG_EXIT, FLOOD, BOTH, RESET, TRIPLE_FAULT = b"\x04", b"\x06", b"\x0f", b"\x12", b"\x14"
SOME_TSC_KHZ = 2_000_000

StartMachine = Callable[..., Awaitable[QemuMachine]]


@pytest.fixture(scope="session")
def qemu() -> QemuBinary:
    require("qemu")
    return find_qemu()


@pytest.fixture
def toy_plan(toy_guest: Path) -> BootPlan:
    return BootPlan(name="toy", memory_mib=32, vcpus=1, kernel=toy_guest, initrd=None, tsc_khz=SOME_TSC_KHZ)


async def test_both_serial_lines_are_heard_and_com1_listens(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        assert witness.output("console") == b"hello console\n"
        await machine.write("console", b"what goes in\n")
        await witness.until_said("console", b"WHAT GOES IN\n")
        assert machine.progress() == len(witness.output("console") + witness.output("control"))


async def test_every_newline_has_the_time_at_which_it_was_read(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = time.monotonic_ns()
    async with running(toy_plan, qemu) as (_, witness):
        await witness.until_said("control", b"\n")
    outputs = [effect for effect in witness.effects if isinstance(effect, SerialOutput)]
    assert [len(output.newlines) for output in outputs] == [output.data.count(b"\n") for output in outputs]
    times = [t for output in outputs for t in output.newlines]
    assert before < times[0] <= times[-1] < time.monotonic_ns()


async def test_what_was_on_the_console_first_is_delivered_first(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        for count in range(1, 51):
            await machine.write("console", BOTH)
            await witness.until_said("control", b"second\n" * count)
            assert witness.output("console").endswith(b"first\n")


async def test_a_large_write_arrives_whole(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    data = b"abcdefgh\n" * 1000
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.write("console", data)
        await witness.until_said("console", data.upper())


async def test_a_triple_fault_is_a_reset(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.write("console", TRIPLE_FAULT)
        assert (await witness.until_stopped()).reason == "reset"


async def test_the_reset_line_of_a_q35_ends_the_guest(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(attrs.evolve(toy_plan, tsc_khz=None), qemu) as (machine, witness):
        await machine.write("console", RESET)
        assert (await witness.until_stopped()).reason == "reset"


async def test_the_debug_exit_port_is_reported_with_its_code(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.write("console", b"last words" + DEBUG_EXIT)
        stopped = await witness.until_stopped()
        assert (stopped.reason, stopped.code) == ("debug-exit", 0x2A)
        assert witness.output("console").endswith(b"LAST WORDS"), "the end comes after the last byte"
        assert witness.effects[-1] == stopped


async def test_a_guest_that_ends_at_once_is_reported_all_the_same(
    toy_plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    kernel = tmp_path / "brief.elf"
    kernel.write_bytes(toy_plan.kernel.read_bytes())
    # The toy's first instruction, cli and a load of the stack pointer, becomes: mov al,7; out 0xf4,al; hlt.
    start = b"\xfa\xbc\x00\x00\x08\x00"
    assert kernel.read_bytes().count(start) == 1
    kernel.write_bytes(kernel.read_bytes().replace(start, b"\xb0\x07\xe6\xf4\xf4\x90"))
    async with running(attrs.evolve(toy_plan, kernel=kernel), qemu) as (_, witness):
        assert (await witness.until_stopped()).code == 7


async def test_a_paused_guest_says_nothing_until_resumed(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        await machine.write("console", b"x")
        await anyio.sleep(0.1)
        assert b"X" not in witness.output("console")
        await machine.resume()
        await witness.until_said("console", b"X")
        assert not witness.stops


async def test_a_flooding_guest_leaves_the_loop_its_turns_and_can_be_stopped(
    toy_plan: BootPlan, qemu: QemuBinary
) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.write("console", FLOOD)
        await witness.until(lambda: machine.progress() > 20_000)
        assert max(len(e.data) for e in witness.effects if isinstance(e, SerialOutput)) <= 64 * 1024
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        await machine.stop()
        assert witness.output("console").count(b"all work and no play\n") > 500


async def test_the_phases_of_a_start_are_recorded(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    timeline = Timeline()
    machine = QemuMachine(toy_plan, timeline, lambda _: None, qemu=qemu)
    with timeline.phase("boot"):
        await machine.start()
    await machine.stop()
    assert [(phase.name, phase.parent) for phase in timeline.phases] == [
        ("qemu_cmd_build", "boot"),
        ("qemu_fork", "boot"),
        ("qemu_qmp_connect", "boot"),
        ("boot", None),
    ]


async def test_a_qemu_killed_from_outside_is_reported_with_how_it_ended(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = children(os.getpid())
    async with running(toy_plan, qemu) as (machine, witness):
        (pid,) = children(os.getpid()) - before
        os.kill(pid, signal.SIGKILL)
        stopped = await witness.until_stopped()
        assert stopped.reason == "machine"
        assert "SIGKILL" in stopped.detail
        with pytest.raises(StateError):
            await machine.write("console", b"x")
        with pytest.raises(StateError):
            await machine.pause()


async def test_stopping_leaves_nothing_and_is_no_news(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(toy_plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.stop()
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go
        progress = machine.progress()
        await machine.stop()
        assert machine.progress() == progress > 0
        assert not witness.stops


async def test_a_guest_that_ended_leaves_nothing_even_before_stop(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.write("console", DEBUG_EXIT)
        await witness.until_stopped()
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_machine_may_be_stopped_by_another_task_and_by_several(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(toy_plan, qemu) as (machine, _):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(machine.stop)
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_writer_waiting_for_a_guest_that_does_not_read_is_woken_by_the_end(
    toy_plan: BootPlan, qemu: QemuBinary
) -> None:
    async with running(toy_plan, qemu) as (machine, _):
        await machine.pause()
        writer = asyncio.ensure_future(machine.write("console", b"x" * 10_000_000))
        await anyio.sleep(0.05)
        assert not writer.done()
        await machine.stop()
        with anyio.fail_after(PATIENCE_S), pytest.raises(StateError, match="has ended"):
            await writer


async def test_a_cancelled_write_leaves_the_line_usable(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, witness):
        await machine.pause()
        with anyio.move_on_after(0.05) as scope:
            await machine.write("console", b"." * 10_000_000)
        assert scope.cancelled_caught
        await machine.resume()
        with anyio.fail_after(PATIENCE_S):
            await machine.write("console", b"!")
        await witness.until_said("console", b"...")


@pytest.mark.parametrize("turns", range(0, 60, 6))
async def test_a_start_cancelled_by_its_scope_leaves_nothing(toy_plan: BootPlan, qemu: QemuBinary, turns: int) -> None:
    plan = attrs.evolve(toy_plan, appended=b"x" * 100_000)
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
async def test_a_start_cancelled_by_its_task_leaves_nothing(toy_plan: BootPlan, qemu: QemuBinary, turns: int) -> None:
    plan = attrs.evolve(toy_plan, appended=b"x" * 100_000)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    task = asyncio.ensure_future(machine.start())
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    for _ in range(3):
        task.cancel()
        await anyio.lowlevel.checkpoint()
    with suppress(asyncio.CancelledError):
        await task
    await machine.stop()
    del task
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_stop_cancelled_still_ends_everything_and_is_cancelled(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    async with running(toy_plan, qemu) as (machine, _):
        task = asyncio.ensure_future(machine.stop())
        await anyio.lowlevel.checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_machine_starts_once(toy_plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(toy_plan, qemu) as (machine, _):
        with pytest.raises(StateError, match="new machine"):
            await machine.start()
    with pytest.raises(StateError):
        await machine.start()


@attrs.frozen
class BadPlan:
    change: dict[str, Any]
    error: type[Exception]
    found: str


BAD_PLANS = {
    "no kernel": BadPlan({"kernel": Path("/nonexistent")}, KernelError, "No such file"),
    "a directory": BadPlan({"kernel": Path("/")}, KernelError, "directory"),
    "no initrd": BadPlan({"initrd": Path("/nonexistent")}, InitrdError, "No such file"),
    "long cmdline": BadPlan({"cmdline": "x" * 2047}, CmdlineError, "bytes"),
    "text kernel": BadPlan({"kernel": Path(__file__)}, MachineError, "QEMU: exit status 1"),
}


@pytest.mark.parametrize("bad", BAD_PLANS.values(), ids=BAD_PLANS.keys())
async def test_a_plan_that_cannot_be_is_refused_with_what_was_found(
    toy_plan: BootPlan, qemu: QemuBinary, bad: BadPlan
) -> None:
    before, witness = holdings(), Witness()
    machine = QemuMachine(attrs.evolve(toy_plan, **bad.change), Timeline(), witness.take, qemu=qemu)
    with pytest.raises(bad.error, match=re.escape(bad.found)) as caught:
        await machine.start()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go
    assert not witness.effects
    if isinstance(caught.value, MachineError):
        assert not caught.value.retryable


@pytest.mark.parametrize(
    ("script", "words", "retryable"),
    [
        ("echo first >&2; echo no such option >&2; exit 1", "exit status 1: no such option", False),
        ("echo cannot set up guest memory: Cannot allocate memory >&2; exit 1", "Cannot allocate memory", True),
        ("kill -9 $$", "SIGKILL", True),
        ("exit 0", "exit status 0", False),
        ("head -c 1000000 /dev/zero >&2; echo; echo the end >&2; exit 1", "the end", False),
    ],
)
async def test_a_qemu_that_ends_at_its_start_is_quoted(
    toy_plan: BootPlan, tmp_path: Path, script: str, words: str, retryable: bool
) -> None:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(toy_plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.fail_after(PATIENCE_S), pytest.raises(MachineError, match=re.escape(words)) as caught:
        await machine.start()
    assert caught.value.retryable is retryable
    assert len(str(caught.value)) < 5000
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_qemu_that_talks_nonsense_is_killed(toy_plan: BootPlan, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "fd = int(next(w for w in sys.argv if w.startswith('socket,id=qmp')).partition('fd=')[2])\n"
        "os.write(fd, b'nonsense\\n')\ntime.sleep(1000)\n"
    )
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(toy_plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.fail_after(PATIENCE_S), pytest.raises(MachineError, match="nonsense"):
        await machine.start()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_qemu_that_is_silent_can_be_cancelled(toy_plan: BootPlan, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\nexec sleep 1000\n")
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(toy_plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.move_on_after(0.1) as scope:
        await machine.start()
    assert scope.cancelled_caught
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
    print(Path("/proc/self/task", *[next(Path("/proc/self/task").iterdir()).name], "children").read_text(), flush=True)
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


@pytest.mark.parametrize("machine_type", ["microvm", "q35"])
async def test_linux_boots_runs_its_workload_and_powers_off(qemu: QemuBinary, machine_type: str) -> None:
    image = default_image()
    plan = BootPlan(
        name="linux",
        memory_mib=256,
        vcpus=2,
        kernel=image.kernel,
        initrd=image.initrd,
        appended=workload_archive(("sh", "-c", "echo cpus=$(nproc)"), ()),
        # Not quiet: more console output than a socket's buffer holds, and all of it on COM1.
        cmdline="console=ttyS0 8250.nr_uarts=1 panic=-1",
        tsc_khz=tsc_khz() if machine_type == "microvm" else None,
    )
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"\nREADY\n")
        await witness.until_said("control", b"workload-exit code=0\n")
        assert b"cpus=2\n" in witness.output("console"), "the workload's output comes before its exit"
        await machine.write("control", b"poweroff\n")
        assert (await witness.until_stopped()).reason == "shutdown"
    assert b"Linux version" in witness.output("console")
    assert witness.output("control").startswith(b"clock tsc=")
