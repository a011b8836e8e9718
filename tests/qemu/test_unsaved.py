"""What keeps a QEMU machine from being saved, and that it runs on all the same."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from asyncvmm.device_config import VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import MachineError, SnapshotFailed, StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.snapshot.memory_writer import MemoryWriter
from tests.support.qemu_machine import TOY_MIB, holdings, running
from tests.support.qemu_saved import Taken, restored, take

pytestmark = pytest.mark.anyio


async def test_a_running_machine_is_not_saved(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    async with running(plan, qemu) as (machine, _):
        with pytest.raises(StateError, match="paused"):
            await take(machine, tmp_path / "memory")
        await machine.pause()
    with pytest.raises(StateError):
        await take(machine, tmp_path / "memory")


async def test_a_difference_is_refused_and_precopy_does_nothing(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    async with running(plan, qemu) as (machine, _):
        with (tmp_path / "memory").open("w+b") as file:
            writer = MemoryWriter(file.fileno(), TOY_MIB << 20)
            await machine.precopy(writer)
            assert not writer.bytes_written
            await machine.pause()
            with pytest.raises(SnapshotFailed, match="difference"):
                await machine.save(writer, difference_of="base")
            machine.saved_as("base")
            await machine.save(writer)


async def test_a_vsock_device_keeps_a_machine_from_being_saved(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path
) -> None:
    plan = attrs.evolve(plan, devices=DeviceConfig(vsock=VsockConfig(uds_path=tmp_path / "vsock")))
    async with running(plan, qemu) as (machine, witness):
        await machine.pause()
        with pytest.raises(SnapshotFailed, match="vsock"):
            await take(machine, tmp_path / "memory")
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")


@attrs.define
class FullDisk:
    """A MemoryWriter that finds no more room."""

    size: int = TOY_MIB << 20

    def write(self, offset: int, data: object) -> None:
        raise SnapshotFailed("memory file", expected="room", found="No space left on device")


@pytest.mark.parametrize("generation", ["booted", "restored"])
async def test_a_full_disk_leaves_the_machine_to_run_on_and_to_be_saved_later(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, taken: Taken, generation: str
) -> None:
    start = running(plan, qemu) if generation == "booted" else restored(plan, taken, qemu)
    async with start as (machine, witness):
        await machine.resume()
        await machine.write("console", b"a")
        await witness.until_said("console", b"A")
        await machine.pause()
        with pytest.raises(SnapshotFailed, match="No space"):
            await machine.save(FullDisk())  # type: ignore[arg-type]
        await machine.resume()
        await machine.write("console", b"b")
        await witness.until_said("console", b"B")
        await machine.pause()
        again = await take(machine, tmp_path / "again")
        async with restored(plan, again, qemu) as (clone, heard):
            await clone.resume()
            await clone.write("console", b"c")
            await heard.until_said("console", b"C")


@pytest.mark.parametrize("turns", [0, 2, 6, 16])
@pytest.mark.parametrize("generation", ["booted", "restored"])
async def test_a_cancelled_save_leaves_the_machine_to_run_on(
    plan: BootPlan, qemu: QemuBinary, tmp_path: Path, taken: Taken, generation: str, turns: int
) -> None:
    start = running(plan, qemu) if generation == "booted" else restored(plan, taken, qemu)
    async with start as (machine, witness):
        await machine.pause()
        before = holdings()
        task = asyncio.ensure_future(take(machine, tmp_path / "cancelled"))
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        del task
        assert not holdings() - before
        await machine.resume()
        await machine.write("console", b"x")
        await witness.until_said("console", b"X")
        assert not witness.stops


async def test_a_qemu_that_dies_while_it_is_saved_is_reported(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        await machine.pause()
        task = asyncio.ensure_future(take(machine, tmp_path / "memory"))
        await anyio.lowlevel.checkpoint()
        assert machine._process is not None
        assert machine._process.child is not None
        machine._process.child.kill()
        with suppress(MachineError, StateError):
            await task
        assert "SIGKILL" in (await witness.until_stopped()).detail
        del task
    assert not holdings() - before
