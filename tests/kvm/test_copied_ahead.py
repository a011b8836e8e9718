"""Memory that is copied while its guest runs on: whole at the end, the dirty log on no longer than that."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.kvm.memory_saver import SMALL_BYTES
from tests.support.memory_guest import PAGE, Files, FullFile, MemoryGuest, New, booted, discard_of, restored

pytestmark = pytest.mark.anyio
MIB = 1 << 20


async def test_memory_that_is_written_while_it_is_copied_ahead_is_saved_as_it_is_at_the_end(
    new: New, files: Files
) -> None:
    async with booted(new(memory_mib=32)) as guest:
        await guest.fill(1000, 4000, 1)
        await guest.begin_dirtying(1000, 4000, 1000)
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
