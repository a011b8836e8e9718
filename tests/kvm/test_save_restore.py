"""A machine that is saved and restored goes on where it was, and the one that was saved runs on unharmed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from tests.support.counting_guest import counting, saved_guest
from tests.support.memory_guest import PAGE, Files, New, Save, booted, new_guest, restored

pytestmark = pytest.mark.anyio


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    return counting(guest("memory"))


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
    assert missing_in(profile) == ["restore_total"]  # which is the VM's


def missing_in(profile: Any) -> list[str]:
    return [field.name for field in attrs.fields(type(profile)) if getattr(profile, field.name) is None]
