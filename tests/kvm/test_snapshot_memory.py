"""Memory is in the file as it was in the guest, whole or as differences, copied ahead or at once; a copy is its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.kvm.discard import GuestDiscard
from asyncvmm.machine.kvm.layers import MOST_MAPPINGS
from asyncvmm.machine.kvm.memory_saver import SMALL_BYTES
from asyncvmm.machine.kvm.restoring import Shell, ShellShape
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.memory_map import Run
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.support.memory_guest import PAGE, PLACE, Files, MemoryGuest, Save, booted, new_guest, restored

pytestmark = pytest.mark.anyio

New = Callable[..., MemoryGuest]
MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    found = Files(tmp_path)
    yield found
    found.close()


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    return lambda **options: new_guest(guest("memory"), **options)


def discard_of(guest: MemoryGuest) -> GuestDiscard:
    """As a balloon has it."""
    vm = guest.machine._vm
    assert vm is not None
    memory = vm.memory
    return GuestDiscard(memory.regions, memory.host_address, memory.backing, on_discard=memory.mark)


class FullFile(MemoryWriter):
    """A memory file for which there is no room."""

    def write_runs(self, memory: memoryview, runs: Iterable[Run]) -> None:
        raise SnapshotFailed("memory file", expected="room for it", found="none left")


# -- whole -------------------------------------------------------------------------------------------------------------


async def test_a_file_holds_what_the_guest_touched_and_little_more(new: New, files: Files) -> None:
    async with booted(new(memory_mib=128)) as guest:
        await guest.fill(2000, 2048, 3)
        await guest.fill(6000, 2048, 0)
        await guest.store(30000, 9)
        await guest.machine.pause()
        saved = await files.save(guest)
        assert await saved.is_memory_of(guest)
    touched = saved.machine.memory.data_bytes
    assert 2049 * PAGE <= touched <= 2049 * PAGE + MIB
    assert saved.allocated <= touched + MIB


async def test_a_restored_guest_has_every_byte(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        for page in range(600, 4000, 97):
            await guest.store(page, page % 251)
        await guest.machine.pause()
        saved = await files.save(guest)
        before = await in_thread(guest.memory)
    async with restored(new(), saved.plan()) as guest:
        assert await in_thread(guest.memory) == before


@pytest.mark.requires("memory above 4 GiB")
async def test_memory_above_the_hole_is_saved(new: New, files: Files) -> None:
    """RAM from 4 GiB on lies behind the first 3 GiB in the file."""
    async with booted(new(memory_mib=3100)) as guest:
        await guest.machine.pause()
        vm = guest.machine._vm
        assert vm is not None
        vm.memory.write((4 << 30) + 5 * PAGE, b"above")
        vm.memory.write((3 << 30) - 5, b"below")
        saved = await files.save(guest)
        assert saved.machine.regions == ((0, 3 << 30), (4 << 30, 28 * MIB))
        assert os.pread(saved.fds[0], 5, (3 << 30) + 5 * PAGE) == b"above"
    async with restored(new(memory_mib=3100), saved.plan()) as guest:
        vm = guest.machine._vm
        assert vm is not None
        assert vm.memory.read((4 << 30) + 5 * PAGE, 5) == b"above"
        assert vm.memory.read((3 << 30) - 5, 5) == b"below"


# -- clones ------------------------------------------------------------------------------------------------------------


@pytest.mark.stalls  # it reads files of its own
async def test_clones_see_neither_each_other_s_writes_nor_does_the_file(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.fill(600, 100, 1)
        await guest.machine.pause()
        saved = await files.save(guest)
    before = digest(saved)
    async with AsyncExitStack() as stack:
        clones = [await stack.enter_async_context(restored(new(), saved.plan())) for _ in range(5)]
        for number, clone in enumerate(clones):
            await clone.machine.resume()
            await clone.store(650, 100 + number)
            await clone.store(3000 + number, 7)
        for number, clone in enumerate(clones):
            assert await clone.load(650) == 100 + number
            assert [await clone.load(3000 + other) for other in range(5)] == [
                7 * (other == number) for other in range(5)
            ]
            assert await clone.load(651) == 1
        assert digest(saved) == before
        late = await stack.enter_async_context(restored(new(), saved.plan()))
        assert await saved.is_memory_of(late)


def digest(saved: Save) -> str:
    return hashlib.sha256(os.pread(saved.fds[0], saved.machine.memory.size, 0)).hexdigest()


async def test_zeros_that_a_clone_reads_take_no_room_in_the_file(new: New) -> None:
    """A hole of a file in memory would be filled by the first who reads it there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        files = Files(Path(directory))
        async with booted(new()) as guest:
            await guest.fill(600, 100, 1)
            await guest.machine.pause()
            saved = await files.save(guest)
        before = saved.allocated
        async with restored(new(), saved.plan()) as guest:
            await guest.machine.resume()
            assert await guest.sum(1000, 3000) == 0
            assert saved.allocated == before
        files.close()


@pytest.mark.parametrize("in_shell", [False, True])
async def test_a_child_that_is_forked_does_not_have_the_guest_s_memory(new: New, files: Files, in_shell: bool) -> None:
    async with booted(new()) as guest:
        await guest.fill(600, 100, 1)
        await guest.machine.pause()
        saved = await files.save(guest)
    shape = ShellShape(memory_bytes=16 * MIB, vcpus=1)
    shell = await in_thread(lambda: Shell(shape, Timeline())) if in_shell else None
    async with restored(new(), saved.plan(), shell) as guest:
        vm = guest.machine._vm
        assert vm is not None
        assert all("dc" in flags for flags in flags_of(vm.memory.host_address, 16 * MIB))


def flags_of(host_address: int, size: int) -> list[list[str]]:
    """VmFlags of the mappings that lie there, at least one."""
    found, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) < host_address + size and int(match[2], 16) > host_address
        elif inside and line.startswith("VmFlags:"):
            found.append(line.split()[1:])
    assert found
    return found


async def test_a_page_that_a_restored_guest_gives_back_is_zeros_in_its_snapshot(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.fill(600, 100, 1)
        await guest.machine.pause()
        saved = await files.save(guest)
    async with restored(new(), saved.plan(track_dirty=True)) as guest:
        guest.machine.saved_as("first")
        assert discard_of(guest).release([(610 * PAGE, 3 * PAGE)]) == 3 * PAGE
        whole = await files.save(guest)
        assert await whole.is_memory_of(guest)
        less = await files.save(guest, saved, "first")
        assert await less.is_memory_of(guest)
        assert less.machine.memory.zero == ((610 * PAGE, 3 * PAGE),)
    for save in (whole, less):
        async with restored(new(), save.plan()) as guest:
            await guest.machine.resume()
            assert [await guest.load(page) for page in (609, 610, 612, 613)] == [1, 0, 0, 1]


# -- ahead -------------------------------------------------------------------------------------------------------------


async def test_memory_that_is_written_while_it_is_copied_ahead_is_saved_as_it_is_at_the_end(
    new: New, files: Files
) -> None:
    async with booted(new(memory_mib=32)) as guest:
        await guest.fill(1000, 4000, 1)
        await guest.begin_dirtying(1000, 4000, 4000)
        await anyio.sleep(0.05)
        for _ in range(3):
            writer = files.writer(32 * MIB)
            await guest.machine.precopy(writer)
            await guest.machine.pause()
            ahead = writer.bytes_written
            saved = files.saved(await guest.machine.save(writer))
            assert writer.bytes_written - ahead <= 2 * SMALL_BYTES
            assert await saved.is_memory_of(guest)
            await guest.machine.resume()
        await guest.end_dirtying()
    async with restored(new(memory_mib=32), saved.plan()) as guest:
        await guest.machine.resume()
        await guest.end_dirtying()


async def test_the_dirty_log_is_on_only_from_precopy_to_the_resumption(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        log = guest.machine._building.log
        assert log is not None
        writer = files.writer(16 * MIB)
        await guest.machine.precopy(writer)
        assert log.is_on
        await guest.machine.pause()
        await guest.machine.save(writer)
        await guest.machine.resume()
        await settled(guest)
        assert not log.is_on
        with anyio.CancelScope() as scope:
            scope.cancel()
            await guest.machine.precopy(files.writer(16 * MIB))
        assert not log.is_on
        full = FullFile(files.writer(16 * MIB)._fd, 16 * MIB)
        with pytest.raises(SnapshotFailed):
            await guest.machine.precopy(full)
        assert not log.is_on


async def settled(guest: MemoryGuest) -> None:
    """What a resumption has begun beside is done."""
    saving = guest.machine._snapshots._saving
    assert saving is not None
    await saving._settled()


async def test_a_cancelled_resumption_is_one_all_the_same(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.machine.precopy(files.writer(16 * MIB))
        await guest.machine.pause()
        await files.save(guest)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await guest.machine.resume()
        assert await guest.count() == 1


async def test_a_stop_does_not_wait_for_a_call_that_is_done(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.machine.pause()
        await files.save(guest)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        saving = guest.machine._snapshots._saving
        assert saving is not None
        saving._calls.add(done)  # as one whose caller has yet to have its turn
        await guest.machine.stop()


async def test_the_dirty_log_is_off_after_a_save_that_failed(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        log = guest.machine._building.log
        assert log is not None
        await guest.machine.precopy(files.writer(16 * MIB))
        await guest.machine.pause()
        with pytest.raises(SnapshotFailed):
            await guest.machine.save(FullFile(files.writer(16 * MIB)._fd, 16 * MIB))
        await guest.machine.resume()
        await settled(guest)
        assert not log.is_on


async def test_what_the_host_writes_meanwhile_is_saved(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        vm = guest.machine._vm
        assert vm is not None
        await guest.fill(1000, 100, 1)
        writer = files.writer(16 * MIB)
        await guest.machine.precopy(writer)
        vm.memory.write(1050 * PAGE, b"host")
        discard_of(guest).release([(1060 * PAGE, PAGE)])
        await guest.machine.pause()
        saved = files.saved(await guest.machine.save(writer))
        assert await saved.is_memory_of(guest)
        assert saved.memory()[1060 * PAGE : 1061 * PAGE] == bytes(PAGE)


async def test_a_save_to_another_file_than_was_copied_ahead_to_is_whole(new: New, files: Files) -> None:
    async with booted(new()) as guest:
        await guest.fill(1000, 100, 1)
        await guest.machine.precopy(files.writer(16 * MIB))
        await guest.machine.pause()
        saved = await files.save(guest)
        assert await saved.is_memory_of(guest)


# -- differences -------------------------------------------------------------------------------------------------------


async def test_a_difference_has_what_was_written_since(new: New, files: Files) -> None:
    async with booted(new(track_dirty=True)) as guest:
        await guest.fill(1000, 100, 1)
        await guest.machine.pause()
        whole = await files.save(guest)
        guest.machine.saved_as("whole")
        await guest.machine.resume()
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


async def test_memory_copied_ahead_can_be_a_difference(new: New, files: Files) -> None:
    async with booted(new(track_dirty=True)) as guest:
        await guest.fill(1000, 1000, 1)
        await guest.machine.pause()
        whole = await files.save(guest)
        guest.machine.saved_as("whole")
        await guest.machine.resume()
        await guest.fill(1100, 200, 2)
        await guest.begin_dirtying(1100, 200, 2000)
        writer = files.writer(16 * MIB, difference=True)
        await guest.machine.precopy(writer)
        await guest.machine.pause()
        less = files.saved(await guest.machine.save(writer, difference_of="whole"), whole)
        assert await less.is_memory_of(guest)
        assert less.machine.memory.data_bytes <= 220 * PAGE


async def test_a_difference_in_more_pieces_than_are_mapped_is_restored(new: New, files: Files) -> None:
    """Beyond a bound pieces are copied: data from the file, zeros over what was data."""
    pieces = range(600, 600 + 2 * 3 * MOST_MAPPINGS // 2, 2)
    async with booted(new(track_dirty=True)) as guest:
        await guest.fill(600, 3400, 1)
        await guest.machine.pause()
        whole = await files.save(guest)
        guest.machine.saved_as("whole")
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
