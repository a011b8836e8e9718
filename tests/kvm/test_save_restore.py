"""A machine that is saved and restored goes on where it was, and the one that was saved runs on unharmed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch, StateError
from asyncvmm.machine.kvm.restoring import Shell, ShellShape
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.memory_map import Run
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.support.cancelling import Cancelled, Tripwire
from tests.support.holdings import Holdings
from tests.support.memory_guest import PAGE, Files, MemoryGuest, Save, booted, new_guest, restored

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that no other mapping has."""
RAM = MEMORY_MIB << 20
New = Callable[..., MemoryGuest]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    found = Files(tmp_path)
    yield found
    found.close()


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    def make(**options: Any) -> MemoryGuest:
        return new_guest(guest("memory"), **{"memory_mib": MEMORY_MIB, **options})

    return make


async def saved_guest(new: New, files: Files, **options: Any) -> Save:
    """One that has counted to 2 and written pages 5000 to 5099."""
    async with booted(new(**options)) as guest:
        assert await guest.count() == 1
        assert await guest.count() == 2
        await guest.fill(5000, 100, 7)
        await guest.machine.pause()
        return await files.save(guest)


class FullFile(MemoryWriter):
    """A memory file for which there is no more room after some runs."""

    room = 1

    def write_runs(self, memory: memoryview, runs: Iterable[Run]) -> None:
        for run in runs:
            self.room -= 1
            if self.room < 0:
                raise SnapshotFailed("memory file", expected="room for it", found="none left")
            super().write_runs(memory, [run])


# -- going on ----------------------------------------------------------------------------------------------------------


async def test_a_restored_guest_goes_on_where_it_was_saved(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(), saved.plan()) as guest:
        await guest.machine.resume()
        assert await guest.count() == 3
        assert await guest.sum(5000, 100) == 0x0707070707070707 * 512 * 100 % (1 << 64)


async def test_the_guest_that_was_saved_runs_on(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        assert await guest.count() == 1
        await guest.machine.pause()
        await files.save(guest)
        await guest.machine.resume()
        assert await guest.count() == 2


async def test_a_restored_guest_takes_no_step_before_it_is_resumed(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(), saved.plan()) as guest:
        await guest.machine.write("console", b"x")
        await anyio.sleep(0.05)
        assert guest.machine.progress() == 0
        assert guest.run.output == b""
        assert await saved.is_memory_of(guest)
        await guest.machine.resume()
        await guest.run.said(b"\3")


async def test_input_that_a_guest_has_not_read_is_saved(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.machine.pause()
        await guest.machine.write("console", b"xx")
        saved = await files.save(guest)
    async with restored(new(), saved.plan()) as guest:
        await guest.machine.resume()
        await guest.run.said(b"\1\2")


async def test_output_from_before_the_save_is_not_told_again(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.count()
        await guest.machine.pause()
        saved = await files.save(guest)
        assert guest.run.output == b">\1"
    async with restored(new(), saved.plan()) as guest:
        await guest.machine.resume()
        assert await guest.count() == 2
        assert guest.run.output == b"\2"


async def test_a_flood_of_output_is_told_by_whom_it_was_saved_from(guest: Callable[[str], Path], files: Files) -> None:
    """flood.S writes without end, more than the loop is told in one turn."""
    flooding = new_guest(guest("flood"), memory_mib=4)
    try:
        await flooding.machine.start()
        await flooding.run.until(lambda: len(flooding.run.output) > 1 << 16)
        await flooding.machine.pause()
        saved = await files.save(flooding)
        heard = len(flooding.run.output) + flooding.run.lost
        await anyio.sleep(0.05)
        assert len(flooding.run.output) + flooding.run.lost == heard
    finally:
        await flooding.machine.stop()
    async with restored(new_guest(guest("flood"), memory_mib=4), saved.plan()) as clone:
        await anyio.sleep(0.02)
        assert clone.run.output == b""


async def test_a_guest_saved_in_the_midst_of_serial_output_loses_and_doubles_nothing(new: New, files: Files) -> None:
    """Each moment falls into another part of ``x``: polling LSR, reading a byte, writing one."""
    async with booted(new()) as guest:
        for moment in range(20):
            await guest.machine.write("console", b"x" * 10)
            await anyio.sleep(0.0003 * moment)
            await guest.machine.pause()
            saved, heard = await files.save(guest), guest.run.output[1:]
            assert await all_heard(new, saved, heard, 10 * (moment + 1)) == bytes(range(1, 10 * moment + 11))
            await guest.machine.resume()
            await guest.run.said(bytes([10 * moment + 10]))


async def all_heard(new: New, saved: Save, heard: bytes, size: int) -> bytes:
    """What was heard of a guest before it was saved, and of its copy until it is so much."""
    async with restored(new(), saved.plan()) as clone:
        await clone.machine.resume()
        await clone.run.until(lambda: len(heard + clone.run.output) >= size)
        return heard + clone.run.output


async def test_a_restored_machine_can_be_saved_and_restored(new: New, files: Files) -> None:
    save = await saved_guest(new, files)
    for count in range(3, 7):
        async with restored(new(), save.plan()) as guest:
            await guest.machine.resume()
            assert await guest.count() == count
            await guest.store(6000 + count, count)
            await guest.machine.pause()
            save = await files.save(guest)
            assert await save.is_memory_of(guest)
    async with restored(new(), save.plan()) as guest:
        await guest.machine.resume()
        assert [await guest.load(6000 + count) for count in range(3, 7)] == [3, 4, 5, 6]


async def test_several_vcpus_are_restored(new: New, files: Files) -> None:
    saved = await saved_guest(new, files, vcpus=3)
    assert {name for name in saved.machine.sections if name.startswith("vcpu")} == {"vcpu0", "vcpu1", "vcpu2"}
    async with restored(new(vcpus=3), saved.plan()) as guest:
        await guest.machine.resume()
        assert await guest.count() == 3


# -- how a restore is told of ------------------------------------------------------------------------------------------


async def test_the_first_exit_of_a_restored_guest_is_marked_and_told_once(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    told: list[object] = []
    async with restored(new(), saved.plan()) as guest:
        guest.machine.on_first_exit(told.append)
        marks = guest.machine.restored
        assert marks is not None
        assert (marks.resumed_ns, marks.first_exit_ns) == (None, None)
        await guest.machine.resume()
        assert await guest.count() == 3
        assert told == [marks]
        assert marks.resumed_ns is not None
        assert marks.entered_ns is not None
        assert marks.first_exit_ns is not None
        assert marks.mapped_ns <= marks.resumed_ns
        assert marks.entered_ns < marks.first_exit_ns
        assert marks.faults.minor >= 1
        assert guest.machine.page_faults().minor >= marks.faults.minor


async def test_a_restore_has_its_phases(new: New, files: Files) -> None:
    from asyncvmm.timing.derive import restore_profile

    saved = await saved_guest(new, files)
    guest = new()
    async with restored(guest, saved.plan(touched=[(5000 * PAGE, PAGE)])):
        await guest.machine.resume()
        await guest.count()
        profile = restore_profile(guest.machine._timeline.phases)
    assert None not in vars_of(profile)


def vars_of(profile: Any) -> list[object]:
    return [getattr(profile, field.name) for field in attrs.fields(type(profile))]


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
        writer = files.writer(RAM)
        with pytest.raises(SnapshotFailed, match="none left"):
            await guest.machine.save(FullFile(writer._fd, RAM))
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
    (await made_ahead()).close()
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
    (await made_ahead()).close()
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
    (await made_ahead()).close()
    before = holdings(RAM)
    guest = new()
    with anyio.move_on_after(delay_s):
        await guest.machine.restore(saved.plan(), shell=await made_ahead())
        await anyio.sleep_forever()
    await guest.machine.stop()
    assert holdings(RAM) == before
