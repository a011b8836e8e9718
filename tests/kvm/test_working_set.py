"""What a restored guest needs first is seen, and can be there before it asks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from asyncvmm.snapshot.memory_map import Run
from tests.support.memory_guest import PAGE, Files, New, Save, booted, restored

pytestmark = pytest.mark.anyio


async def saved_guest(new: New, files: Files) -> Save:
    async with booted(new(memory_mib=64)) as guest:
        await guest.fill(1000, 8000, 1)
        await guest.machine.pause()
        return await files.save(guest)


def has(runs: Sequence[Run], page: int) -> bool:
    return any(offset <= page * PAGE < offset + size for offset, size in runs)


async def test_pages_that_were_read_and_pages_that_were_written_are_told_apart(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(memory_mib=64), saved.plan()) as guest:
        await guest.machine.resume()
        await guest.load(3000)
        await guest.store(5000, 9)
        touched, written = await guest.machine.working_set()
        assert [has(touched, page) for page in (3000, 5000, 7000)] == [True, True, False]
        assert [has(written, page) for page in (3000, 5000, 7000)] == [False, True, False]
        assert sum(size for _, size in written) < 64 * PAGE


async def test_before_its_guest_runs_nothing_of_a_restored_machine_is_there(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(memory_mib=64), saved.plan()) as guest:
        assert await guest.machine.working_set() == ((), ())


async def test_what_is_known_to_be_needed_is_there_before_the_guest_runs(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    wanted, own = ((2000 * PAGE, 50 * PAGE),), ((4000 * PAGE, PAGE), (4100 * PAGE, 2 * PAGE))
    async with restored(new(memory_mib=64), saved.plan(touched=wanted, written=own)) as guest:
        touched, written = await guest.machine.working_set()
        assert [has(touched, page) for page in (2000, 2049, 4000, 4101, 6000)] == [True, True, True, True, False]
        assert written == own
        assert await saved.is_memory_of(guest)
        await guest.machine.resume()
        assert await guest.load(4100) == 1


async def test_a_prefetched_guest_has_fewer_faults(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    async with restored(new(memory_mib=64), saved.plan()) as guest:
        await guest.machine.resume()
        await guest.fill(1000, 1000, 2)
        cold = guest.machine.page_faults()
        touched, written = await guest.machine.working_set()
    async with restored(new(memory_mib=64), saved.plan(touched=touched, written=written)) as guest:
        await guest.machine.resume()
        await guest.fill(1000, 1000, 2)
        assert guest.machine.page_faults().minor < cold.minor / 2


async def test_runs_that_lie_outside_of_memory_are_left_alone(new: New, files: Files) -> None:
    saved = await saved_guest(new, files)
    lies = ((63 << 20, 2 << 20), (-PAGE, PAGE), (1 << 60, PAGE), (0, 1 << 62))
    async with restored(new(memory_mib=64), saved.plan(touched=lies, written=lies)) as guest:
        assert await guest.machine.working_set() == ((), ())
