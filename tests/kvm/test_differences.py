"""Snapshots that hold what was written since another, and chains of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import anyio
import pytest

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.kvm.layers import MOST_MAPPINGS
from asyncvmm.machine.kvm.restore_chains import ShellShape
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline
from tests.support.memory_guest import (
    PAGE,
    PLACE,
    Files,
    FullFile,
    MemoryGuest,
    New,
    Save,
    booted,
    discard_of,
    restored,
)

pytestmark = pytest.mark.anyio
MIB = 1 << 20

Named = tuple[MemoryGuest, Save]


@pytest.fixture
async def named(new: New, files: Files) -> AsyncIterator[Named]:
    """A guest that runs on, most of its memory filled, and what it was saved as: ``whole``, all of it."""
    async with booted(new(track_dirty=True)) as guest:
        await guest.fill(600, 3400, 1)
        await guest.machine.pause()
        whole = await files.save(guest)
        guest.machine.saved_as("whole")
        await guest.machine.resume()
        yield guest, whole


async def test_a_difference_has_what_was_written_since(named: Named, files: Files) -> None:
    guest, whole = named
    await guest.store(1050, 9)
    await guest.fill(1060, 2, 0)
    await guest.machine.pause()
    less = await files.save(guest, whole, "whole")
    assert await less.is_memory_of(guest)
    found = less.machine.memory
    assert (1050 * PAGE, PAGE) in found.data
    assert found.zero == ((1060 * PAGE, 2 * PAGE),)
    assert found.data_bytes <= 20 * PAGE


@pytest.mark.parametrize(
    ("tracked", "known", "expected"),
    [(False, True, "whose writes are tracked"), (True, False, "nothing saved yet"), (True, True, "of known")],
)
async def test_a_difference_of_something_unknown_is_refused(
    new: New, files: Files, tracked: bool, known: bool, expected: str
) -> None:
    async with booted(new(track_dirty=tracked)) as guest:
        await guest.machine.pause()
        if known:
            await files.save(guest)
        guest.machine.saved_as("known")
        with pytest.raises(SnapshotFailed, match=expected):
            await guest.machine.save(files.writer(16 * MIB, difference=True), difference_of="unknown")
        await guest.machine.resume()
        assert await guest.count() == 1


async def test_a_difference_is_of_the_last_save_that_got_a_name(new: New, files: Files) -> None:
    """A save that nobody named, one that failed and one that was cancelled lose nothing of what changed."""
    async with booted(new(track_dirty=True)) as guest:
        await guest.machine.pause()
        whole = await files.save(guest)
        guest.machine.saved_as("whole")
        for page, disturb in enumerate((unnamed, failed, cancelled, unnamed_ahead), 1000):
            await guest.machine.resume()
            await guest.store(page, 5)
            await guest.machine.pause()
            await disturb(guest, files)
        less = await files.save(guest, whole, "whole")
        assert await less.is_memory_of(guest)
        memory = await in_thread(less.memory)
        assert [memory[page * PAGE + PLACE] for page in range(1000, 1004)] == [5, 5, 5, 5]


async def unnamed(guest: MemoryGuest, files: Files) -> None:
    await files.save(guest)


async def failed(guest: MemoryGuest, files: Files) -> None:
    with pytest.raises(SnapshotFailed):
        await guest.machine.save(
            FullFile(files.writer(16 * MIB)._fd, 16 * MIB, is_difference=True), difference_of="whole"
        )


async def cancelled(guest: MemoryGuest, files: Files) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await guest.machine.save(files.writer(16 * MIB, difference=True), difference_of="whole")


async def unnamed_ahead(guest: MemoryGuest, files: Files) -> None:
    writer = files.writer(16 * MIB, difference=True)
    await guest.machine.precopy(writer)
    await guest.machine.save(writer, difference_of="whole")


async def test_a_restored_machine_gives_differences_of_what_it_was_restored_from(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.fill(1000, 100, 1)
        await guest.machine.pause()
        whole = await files.save(guest)
    async with restored(new(), whole.plan(track_dirty=True)) as guest:
        guest.machine.saved_as("whole")
        await guest.machine.resume()
        await guest.store(1050, 9)
        await guest.machine.pause()
        less = await files.save(guest, whole, "whole")
        assert await less.is_memory_of(guest)
        assert less.machine.memory.data_bytes <= 20 * PAGE
    async with restored(new(), less.plan()) as guest:
        assert await less.is_memory_of(guest)
        await guest.machine.resume()
        assert [await guest.load(page) for page in (1049, 1050)] == [1, 9]


async def test_memory_copied_ahead_can_be_a_difference(named: Named, files: Files) -> None:
    guest, whole = named
    await guest.fill(1100, 200, 2)
    await guest.begin_dirtying(1100, 200, 2000)
    writer = files.writer(16 * MIB, difference=True)
    await guest.machine.precopy(writer)
    await guest.machine.pause()
    less = files.saved(await guest.machine.save(writer, difference_of="whole"), whole)
    assert await less.is_memory_of(guest)
    assert less.machine.memory.data_bytes <= 220 * PAGE


async def test_a_difference_in_more_pieces_than_are_mapped_is_restored(named: Named, new: New, files: Files) -> None:
    """Beyond a bound pieces are copied: data from the file, zeros over what was data."""
    pieces = range(600, 600 + 2 * 3 * MOST_MAPPINGS // 2, 2)
    guest, whole = named
    await guest.machine.pause()
    await in_thread(lambda: scatter(guest, pieces))
    less = await files.save(guest, whole, "whole")
    assert len(less.machine.memory.data) + len(less.machine.memory.zero) > MOST_MAPPINGS
    for shell in (None, await in_thread(lambda: Shell(ShellShape(memory_bytes=16 * MIB, vcpus=1), Timeline()))):
        async with restored(new(), less.plan(), shell) as guest:
            assert await less.is_memory_of(guest)
            again = await files.save(guest)
            assert await again.is_memory_of(guest)
            await guest.machine.resume()
            assert [await guest.load(page) for page in pieces[-4:]] == [0, 2, 0, 2]


def scatter(guest: MemoryGuest, pages: range) -> None:
    """Write pages by turns: zeros, and twos."""
    vm = guest.machine._vm
    assert vm is not None
    for turn, page in enumerate(pages):
        vm.memory.write(page * PAGE, bytes([2 * (turn % 2)]) * PAGE)


@pytest.mark.parametrize("seed", range(3))
async def test_a_chain_of_ten_differences_is_what_was_written(new: New, files: Files, seed: int) -> None:
    """By the guest and by the host, data and zeros; restored in between, saved ahead or not."""
    chance = random.Random(seed)
    model = bytearray(4096)  # what ``load`` says of each page
    guest = new(track_dirty=True)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(booted(guest))
        save, name = None, None
        for step in range(11):
            await write_something(guest, model, chance)
            save = await next_of_chain(guest, files, save, name, ahead=chance.random() < 0.3)
            name = f"step{step}"
            guest.machine.saved_as(name)
            assert await save.is_memory_of(guest)
            if chance.random() < 0.3:
                await guest.machine.stop()
                guest = await stack.enter_async_context(restored(new(), save.plan(track_dirty=True)))
                guest.machine.saved_as(name)
            await guest.machine.resume()
        assert save is not None
        clone = await stack.enter_async_context(restored(new(), save.plan()))
        assert await save.is_memory_of(clone)
        await clone.machine.resume()
        for page in range(1000, 1100):
            assert await clone.load(page) == model[page]


async def write_something(guest: MemoryGuest, model: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 12)):
        page, count, value = chance.randrange(1000, 1090), chance.randrange(1, 10), chance.choice([0, 0, 7, 8, 9])
        how = chance.choice(["store", "fill", "host", "discard"])
        if how == "store":
            await guest.store(page, value)
            model[page] = value
        elif how == "fill":
            await guest.fill(page, count, value)
            model[page : page + count] = bytes([value]) * count
        elif how == "host":
            vm = guest.machine._vm
            assert vm is not None
            vm.memory.write(page * PAGE + PLACE, bytes([value]))
            model[page] = value
        else:
            discard_of(guest).release([(page * PAGE, count * PAGE)])
            model[page : page + count] = bytes(count)


async def next_of_chain(guest: MemoryGuest, files: Files, base: Save | None, name: str | None, *, ahead: bool) -> Save:
    writer = files.writer(16 * MIB, difference=base is not None)
    if ahead:
        await guest.machine.precopy(writer)
    await guest.machine.pause()
    return files.saved(await guest.machine.save(writer, difference_of=name), base)
