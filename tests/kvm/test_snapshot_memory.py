"""Memory is in the file as it was in the guest, whole or as differences, copied ahead or at once; a copy is its own."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.kvm.restore_chains import ShellShape
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline
from tests.support.memory_guest import PAGE, Files, New, Save, booted, discard_of, restored

pytestmark = pytest.mark.anyio
MIB = 1 << 20


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


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_guest_whose_file_was_cut_off_is_not_saved(new: New, files: Files, ahead: bool) -> None:
    """To read what is gone would end the process (SIGBUS)."""
    async with booted(new()) as guest:
        await guest.fill(2000, 500, 3)
        await guest.machine.pause()
        saved = await files.save(guest)
    async with restored(new(), saved.plan()) as guest:
        os.ftruncate(saved.fds[0], 2100 * PAGE)
        save = guest.machine.precopy if ahead else guest.machine.save
        with pytest.raises(SnapshotFailed, match="cut off"):
            await save(files.writer(len(guest.view)))


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
