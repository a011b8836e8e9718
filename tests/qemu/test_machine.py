"""The QEMU machine with a toy guest, and once with Linux, on both event loops."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.effects import SerialOutput
from asyncvmm.guest.archive import workload_archive
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import DEBUG_EXIT, default_image, running, tsc_khz

pytestmark = pytest.mark.anyio

FLOOD, BOTH, RESET, TRIPLE_FAULT = b"\x06", b"\x0f", b"\x12", b"\x14"


async def test_both_serial_lines_are_heard_and_com1_listens(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        assert witness.output("console") == b"hello console\n"
        await machine.write("console", b"what goes in\n")
        await witness.until_said("console", b"WHAT GOES IN\n")
        assert machine.progress() == len(witness.output("console") + witness.output("control"))


async def test_every_newline_has_the_time_at_which_it_was_read(plan: BootPlan, qemu: QemuBinary) -> None:
    before = time.monotonic_ns()
    async with running(plan, qemu) as (_, witness):
        await witness.until_said("control", b"\n")
    outputs = [effect for effect in witness.effects if isinstance(effect, SerialOutput)]
    assert [len(output.newlines) for output in outputs] == [output.data.count(b"\n") for output in outputs]
    times = [t for output in outputs for t in output.newlines]
    assert before < times[0] <= times[-1] < time.monotonic_ns()


async def test_what_was_on_the_console_first_is_delivered_first(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        for count in range(1, 51):
            await machine.write("console", BOTH)
            await witness.until_said("control", b"second\n" * count)
            assert witness.output("console").endswith(b"first\n")


async def test_a_large_write_arrives_whole(plan: BootPlan, qemu: QemuBinary) -> None:
    data = b"abcdefgh\n" * 1000
    async with running(plan, qemu) as (machine, witness):
        await machine.write("console", data)
        await witness.until_said("console", data.upper())


async def test_a_triple_fault_is_a_reset(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await machine.write("console", TRIPLE_FAULT)
        assert (await witness.until_stopped()).reason == "reset"


async def test_the_reset_line_of_a_q35_ends_the_guest(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(attrs.evolve(plan, tsc_khz=None), qemu) as (machine, witness):
        await machine.write("console", RESET)
        assert (await witness.until_stopped()).reason == "reset"


async def test_the_debug_exit_port_is_reported_with_its_code(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await machine.write("console", b"last words" + DEBUG_EXIT)
        stopped = await witness.until_stopped()
        assert (stopped.reason, stopped.code) == ("debug-exit", 0x2A)
        assert witness.output("console").endswith(b"LAST WORDS"), "the end comes after the last byte"
        assert witness.effects[-1] == stopped


async def test_a_guest_that_ends_at_once_is_reported_all_the_same(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    kernel = tmp_path / "brief.elf"
    kernel.write_bytes(plan.kernel.read_bytes())
    # The toy's first instruction, cli and a load of the stack pointer, becomes: mov al,7; out 0xf4,al; hlt.
    start = b"\xfa\xbc\x00\x00\x08\x00"
    assert kernel.read_bytes().count(start) == 1
    kernel.write_bytes(kernel.read_bytes().replace(start, b"\xb0\x07\xe6\xf4\xf4\x90"))
    async with running(attrs.evolve(plan, kernel=kernel), qemu) as (_, witness):
        assert (await witness.until_stopped()).code == 7


async def test_a_paused_guest_says_nothing_until_resumed(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        await machine.write("console", b"x")
        await anyio.sleep(0.1)
        assert b"X" not in witness.output("console")
        await machine.resume()
        await witness.until_said("console", b"X")
        assert not witness.stops


async def test_a_flooding_guest_leaves_the_loop_its_turns_and_can_be_stopped(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await machine.write("console", FLOOD)
        await witness.until(lambda: machine.progress() > 20_000)
        assert max(len(e.data) for e in witness.effects if isinstance(e, SerialOutput)) <= 64 * 1024
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        await machine.stop()
        assert witness.output("console").count(b"all work and no play\n") > 500


async def test_the_phases_of_a_start_are_recorded(plan: BootPlan, qemu: QemuBinary) -> None:
    timeline = Timeline()
    machine = QemuMachine(plan, timeline, lambda _: None, qemu=qemu)
    with timeline.phase("boot"):
        await machine.start()
    await machine.stop()
    assert [(phase.name, phase.parent) for phase in timeline.phases] == [
        ("qemu_cmd_build", "boot"),
        ("qemu_fork", "boot"),
        ("qemu_qmp_connect", "boot"),
        ("boot", None),
    ]


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
