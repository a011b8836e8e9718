"""QemuMachine.save and restore: a toy guest for what can go wrong, and one Linux with devices for what must go on."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from asyncvmm.errors import SnapshotMismatch
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import DEBUG_EXIT, SOME_TSC_KHZ, running
from tests.support.qemu_saved import Taken, refused, restored, take

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.mark.parametrize("tsc_khz", [SOME_TSC_KHZ, None], ids=["microvm", "q35"])
async def test_a_restored_guest_goes_on_where_it_was_saved_and_so_does_the_original(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, tsc_khz: int | None
) -> None:
    plan = attrs.evolve(plan, tsc_khz=tsc_khz)
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        taken = await take(machine, tmp_path / "memory")
        # The kernel is in the snapshot: its file may be gone.
        elsewhere = attrs.evolve(plan, kernel=tmp_path / "gone", appended=b"")
        async with restored(elsewhere, taken, qemu) as (clone, heard):
            await clone.write("console", b"clone\n")
            await clone.resume()
            await heard.until_said("console", b"CLONE\n")
            assert heard.output("console") == b"CLONE\n"
            assert not heard.output("control")
            assert clone.guest_instant(1) is None
            await machine.resume()
            await machine.write("console", b"original\n")
            await witness.until_said("console", b"ORIGINAL\n")
            assert not witness.stops
            await clone.write("console", DEBUG_EXIT)
            assert (await heard.until_stopped()).code == 0x2A


@pytest.mark.requires("kvm")
async def test_a_guest_on_qemus_kvm_goes_on_as_well(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    async with running(plan, qemu, accel="kvm") as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        taken = await take(machine, tmp_path / "memory")
    async with restored(plan, taken, qemu, accel="kvm") as (clone, heard):
        await clone.resume()
        await clone.write("console", b"x")
        await heard.until_said("console", b"X")
    with taken.file.open("rb") as file:
        said = await refused(plan, taken.plan(file.fileno()), qemu, SnapshotMismatch)
    assert "restored accelerator: expected kvm, found tcg" in said


async def test_a_restored_guest_is_held_until_it_is_resumed(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    async with restored(plan, taken, qemu) as (clone, heard):
        await clone.write("console", b"x")
        await anyio.sleep(0.1)
        assert not heard.effects
        await clone.resume()
        await heard.until_said("console", b"X")
        await clone.pause()
        await clone.write("console", b"y")
        await clone.resume()
        await heard.until_said("console", b"Y")
        assert not heard.stops


@pytest.mark.parametrize("size", [1, 2, 17, 10_000])
async def test_what_was_typed_and_not_read_yet_is_read_by_original_and_clone(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, size: int
) -> None:
    typed = (b"0123456789abcdefghijklmnopqrstuvwxyz\n" * 1000)[:size]
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        before = witness.output("console")
        await machine.pause()
        await machine.write("console", typed)
        taken = await take(machine, tmp_path / "memory")
        assert ("serial" in taken.machine.sections) == (size > 1), "the toy uses no FIFO"
        async with restored(plan, taken, qemu) as (clone, heard):
            await clone.resume()
            await heard.until_said("console", typed.upper())
            await clone.write("console", b"!")
            await heard.until_said("console", b"!")
            assert heard.output("console") == typed.upper() + b"!"
        await machine.resume()
        await witness.until_said("console", typed.upper())
        assert witness.output("console") == before + typed.upper()


async def test_what_a_clone_writes_stays_its_own(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    before = await taken.checksum()
    async with (
        restored(plan, taken, qemu) as (one, first),
        restored(plan, taken, qemu) as (other, second),
    ):
        for clone, heard, text in ((one, first, b"one\n"), (other, second, b"other\n"), (one, first, b"more\n")):
            await clone.resume()
            await clone.write("console", text)
            await heard.until_said("console", text.upper())
        assert first.output("console") == b"ONE\nMORE\n"
        assert second.output("console") == b"OTHER\n"
    assert await taken.checksum() == before


async def test_a_machine_saved_again_without_running_gives_the_same(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        first, second = await take(machine, tmp_path / "a"), await take(machine, tmp_path / "b")
        assert first.machine == second.machine
        assert await first.checksum() == await second.checksum()
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")
        await machine.pause()
        assert (await take(machine, tmp_path / "c")).machine.sections != first.machine.sections


async def test_a_restored_machine_can_be_saved_and_restored(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, tmp_path: Path
) -> None:
    for generation in range(3):
        async with restored(plan, taken, qemu) as (clone, heard):
            await clone.resume()
            await clone.write("console", b"%d\n" % generation)
            await heard.until_said("console", b"%d\n" % generation)
            await clone.pause()
            again = await take(clone, tmp_path / f"memory{generation}")
            assert len(again.machine.sections["qemu"]) < 2 * len(taken.machine.sections["qemu"])
            assert abs(again.machine.memory.data_bytes - taken.machine.memory.data_bytes) < MIB
            await clone.resume()
            await clone.write("console", b"on\n")
            await heard.until_said("console", b"ON\n")
        taken = again


async def test_a_snapshot_that_may_only_be_read_is_copied(
    plan: BootPlan, qemu: QemuBinary, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    async with restored(plan, taken, qemu) as (clone, heard):
        await clone.resume()
        await clone.write("console", b"x")
        await heard.until_said("console", b"X")


async def test_the_phases_of_a_restore_are_recorded(plan: BootPlan, qemu: QemuBinary, taken: Taken) -> None:
    timeline = Timeline()
    machine = QemuMachine(plan, timeline, lambda _: None, qemu=qemu)
    with taken.file.open("rb") as file:
        await machine.restore(taken.plan(file.fileno()))
    await machine.stop()
    assert [phase.name for phase in timeline.phases] == [
        "qemu_cmd_build",
        "memory_state_write",
        "qemu_fork",
        "qemu_qmp_connect",
        "device_state_restore",
    ]
