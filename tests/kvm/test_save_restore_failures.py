"""Saves and restores that are refused, fail or are cancelled: the machine is as it was, or nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch, StateError
from asyncvmm.machine.kvm.restore_chains import ShellShape
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline
from tests.support.cancelling import Cancelled, Tripwire
from tests.support.counting_guest import MEMORY_MIB, RAM, counting, saved_guest
from tests.support.holdings import Holdings
from tests.support.memory_guest import PAGE, Files, FullFile, MemoryGuest, New, booted, restored

pytestmark = pytest.mark.anyio


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    return counting(guest("memory"))


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_a_running_machine_is_not_saved(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        with pytest.raises(StateError, match="paused"):
            await files.save(guest)
        assert await guest.count() == 1


async def test_a_machine_is_not_resumed_while_it_is_saved(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.fill(5000, 8000, 1)
        await guest.machine.pause()
        await guest.machine.expect_save()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(files.save, guest)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            with pytest.raises(StateError, match="not being saved"):
                await guest.machine.resume()
            with pytest.raises(StateError, match="one at a time"):
                await files.save(guest)
        await guest.machine.resume()
        assert await guest.count() == 1


async def test_a_snapshot_of_another_size_is_refused(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    for options in ({"memory_mib": MEMORY_MIB + 1}, {"vcpus": 2}):
        guest = new(**options)
        with pytest.raises(SnapshotMismatch):
            await guest.machine.restore(saved.plan())


async def test_a_memory_file_that_is_gone_is_refused(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    plan = saved.plan()
    files.close()
    with pytest.raises(SnapshotDamaged, match="saved memory"):
        await new().machine.restore(plan)


# -- failing and being cancelled ---------------------------------------------------------------------------------------


async def test_a_save_that_fails_leaves_the_machine_as_it_was(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.count()
        await guest.machine.pause()
        full = FullFile(files.writer(RAM)._fd, RAM)
        full.room = PAGE
        with pytest.raises(SnapshotFailed, match="none left"):
            await guest.machine.save(full)
        assert full.bytes_written == PAGE
        saved = await files.save(guest)
        assert await saved.is_memory_of(guest)
        await guest.machine.resume()
        assert await guest.count() == 2


@pytest.mark.parametrize("delay_s", [0, 0.001, 0.01])
@pytest.mark.parametrize("call", ["save", "precopy"])
async def test_a_save_that_is_cancelled_leaves_the_machine_as_it_was(
    new: New, files: Files, delay_s: float, call: str
) -> None:
    async with booted(new()) as guest:
        await guest.fill(600, 15000, 1)
        await guest.machine.pause()
        with anyio.move_on_after(delay_s):
            await getattr(guest.machine, call)(files.writer(RAM))
        saved = await files.save(guest)
        assert await saved.is_memory_of(guest)
        await guest.machine.resume()
        assert await guest.count() == 1


@pytest.mark.parametrize("delay_s", [0, 0.002, 0.01])
@pytest.mark.parametrize("call", ["save", "precopy"])
async def test_a_task_that_saves_can_be_cancelled(new: New, files: Files, delay_s: float, call: str) -> None:
    """asyncio's cancellation pierces a shield; the file must not be closed under a thread that writes to it."""
    async with booted(new()) as guest:
        await guest.fill(600, 15000, 1)
        await guest.machine.pause()
        writer = files.writer(RAM)
        task = asyncio.ensure_future(getattr(guest.machine, call)(writer))
        await anyio.sleep(delay_s)
        task.cancel()
        await asyncio.wait([task])
        written = writer.bytes_written
        saved = await files.save(guest)
        assert writer.bytes_written == written
        assert await saved.is_memory_of(guest)


@pytest.mark.parametrize("delay_s", [0, 0.002, 0.01])
async def test_a_machine_that_is_stopped_while_it_is_saved_is_gone(
    new: New, files: Files, delay_s: float, holdings: Callable[..., Holdings]
) -> None:
    await saved_guest(new, files)
    files.close()
    before = holdings(RAM)
    guest = new()
    async with booted(guest):
        await guest.fill(600, 15000, 1)
        await guest.machine.pause()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save_that_may_fail, guest, files)
            await anyio.sleep(delay_s)
            await guest.machine.stop()
    files.close()
    assert holdings(RAM) == before


async def save_that_may_fail(guest: MemoryGuest, files: Files) -> None:
    with suppress(StateError):
        await files.save(guest)


@pytest.mark.parametrize("delay_s", [0, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.02])
async def test_a_restore_that_is_cancelled_leaves_nothing(
    new: New, files: Files, delay_s: float, holdings: Callable[..., Holdings]
) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(), saved.plan()):
        pass
    before = holdings(RAM)
    guest = new()
    with anyio.move_on_after(delay_s):
        await guest.machine.restore(saved.plan())
        await anyio.sleep_forever()
    await guest.machine.stop()
    assert holdings(RAM) == before


PHASES = (
    *("kvm_open", "kvm_create_vm", "vm_arch_setup", "memory_alloc", "memory_register", "irqchip_create"),
    *("vcpu_create", "cpuid_config", "memory_state_write", "vcpu_state_restore", "device_state_restore"),
)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_restore_that_is_cancelled_at_a_phase_leaves_nothing(
    new: New, files: Files, phase: str, holdings: Callable[..., Holdings]
) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(), saved.plan()):
        pass
    before = holdings(RAM)
    loop = asyncio.get_running_loop()
    with Cancelled() as scope:
        wire = Tripwire(phase, lambda: loop.call_soon_threadsafe(scope.cancel))
        guest = new(timeline=wire)
        await guest.machine.restore(saved.plan(touched=[(5000 * PAGE, PAGE)]))
        await anyio.sleep_forever()
    assert wire.tripped
    await guest.machine.stop()
    assert holdings(RAM) == before


async def test_the_phases_cancelled_here_are_all_there_are(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    guest = new()
    async with restored(guest, saved.plan()):
        assert {phase.name for phase in guest.machine._timeline.phases} == set(PHASES)


async def test_a_restore_that_fails_leaves_nothing(new: New, files: Files, holdings: Callable[..., Holdings]) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(), saved.plan()):
        pass
    before = holdings(RAM)
    for what in ("vcpu0", "vm", "board"):
        broken = saved.plan()
        sections = {**broken.saved.sections, what: b"no section"}
        with pytest.raises(SnapshotDamaged):
            await new().machine.restore(attrs.evolve(broken, saved=attrs.evolve(broken.saved, sections=sections)))
    assert holdings(RAM) == before


# -- in a shell --------------------------------------------------------------------------------------------------------


async def made_ahead(vcpus: int = 1) -> Shell:
    return await in_thread(lambda: Shell(ShellShape(memory_bytes=RAM, vcpus=vcpus), Timeline()))


async def test_a_machine_is_restored_in_a_shell(new: New, files: Files, holdings: Callable[..., Holdings]) -> None:
    saved = await saved_guest(new, files)
    await in_thread((await made_ahead()).close)
    before = holdings(RAM)
    shell = await made_ahead()
    async with restored(new(), saved.plan(), shell) as guest:
        assert await saved.is_memory_of(guest)
        await guest.machine.resume()
        assert await guest.count() == 3
    assert holdings(RAM) == before


async def test_a_shell_of_another_shape_is_refused_and_freed(
    new: New, files: Files, holdings: Callable[..., Holdings]
) -> None:
    saved = await saved_guest(new, files)
    await in_thread((await made_ahead()).close)
    before = holdings(RAM)
    shell = await made_ahead(vcpus=2)
    with pytest.raises(ValueError, match="a shell of"):
        await new().machine.restore(saved.plan(), shell=shell)
    assert holdings(RAM) == before


@pytest.mark.parametrize("delay_s", [0, 0.0003, 0.001, 0.002, 0.004])
async def test_a_restore_in_a_shell_that_is_cancelled_leaves_nothing(
    new: New, files: Files, delay_s: float, holdings: Callable[..., Holdings]
) -> None:
    saved = await saved_guest(new, files)
    await in_thread((await made_ahead()).close)
    before = holdings(RAM)
    guest = new()
    with anyio.move_on_after(delay_s):
        await guest.machine.restore(saved.plan(), shell=await made_ahead())
        await anyio.sleep_forever()
    await guest.machine.stop()
    assert holdings(RAM) == before
