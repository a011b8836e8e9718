"""Whatever is written to a guest's memory is known: by the guest, by the host; and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.machine.kvm.dirty import DirtyLog, HostWrites
from asyncvmm.machine.kvm.dirty_ring import DirtyRing
from asyncvmm.machine.kvm.pages import PageSet
from tests.support.memory_guest import OWN_PAGES, PAGE, SMALLEST_RING, MemoryGuest, booted, new_guest

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["bitmap", "ring", "small ring"])
async def running(guest: Callable[[str], Path], request: pytest.FixtureRequest) -> AsyncIterator[MemoryGuest]:
    """A guest whose log is off. A VM with rings must be made with them, and has its log on until it is turned off."""
    ring_bytes = {"bitmap": 0, "ring": 1 << 16, "small ring": SMALLEST_RING}[request.param]
    async with booted(new_guest(guest("memory"), track_dirty=ring_bytes > 0, ring_bytes=ring_bytes)) as found:
        assert isinstance(log_of(found), DirtyRing) == (ring_bytes > 0)
        log_of(found).end()
        yield found


def log_of(guest: MemoryGuest) -> DirtyLog:
    log = guest.machine._building.log
    assert log is not None
    return log


async def written(guest: MemoryGuest) -> set[int]:
    """The pages, the guest's own left out, of which is known that they were written since the last call."""
    await guest.machine.pause()
    pages = PageSet(len(guest.view))
    log_of(guest).collect([pages])
    await guest.machine.resume()
    return {
        page
        for offset, size in pages.runs()
        for page in range(offset // PAGE, (offset + size) // PAGE)
        if page >= OWN_PAGES
    }


async def test_the_log_names_the_pages_that_the_guest_writes_and_none_that_it_does_not_touch(
    running: MemoryGuest,
) -> None:
    """One that is read for the first time may be among them: KVM can map it for writing as well, which counts."""
    log_of(running).begin()
    for page in (OWN_PAGES, 700, 701, 703, 4095):
        await running.store(page, 1)
    await running.load(800)
    await running.sum(1000, 50)
    found, stored = await written(running), {OWN_PAGES, 700, 701, 703, 4095}
    assert stored <= found <= stored | {800, *range(1000, 1050), *range(OWN_PAGES)}
    assert await written(running) == set()
    await running.store(703, 1)
    assert await written(running) == {703}


async def test_a_page_that_is_written_the_same_again_is_written(running: MemoryGuest) -> None:
    await running.store(900, 5)
    log_of(running).begin()
    await running.store(900, 5)
    assert await written(running) == {900}


async def test_many_pages_are_named(running: MemoryGuest) -> None:
    log_of(running).begin()
    await running.fill(1000, 2000, 9)
    await running.fill(3500, 1, 9)
    assert await written(running) == {*range(1000, 3000), 3500}


async def test_what_the_host_writes_is_named(running: MemoryGuest) -> None:
    vm = running.machine._vm
    assert vm is not None
    log_of(running).begin()
    vm.memory.write(1000 * PAGE - 1, b"ab")
    vm.memory.mark(2000 * PAGE, 2 * PAGE)
    assert await written(running) == {999, 1000, 2000, 2001}
    assert await written(running) == set()


async def test_what_is_no_ram_is_not_marked(running: MemoryGuest) -> None:
    vm = running.machine._vm
    assert vm is not None
    log_of(running).begin()
    with pytest.raises(ConfigError, match="RAM"):
        vm.memory.mark(len(running.view) - 1, 2)


async def test_without_a_log_nothing_is_kept(running: MemoryGuest) -> None:
    vm = running.machine._vm
    assert vm is not None
    await running.store(700, 1)
    vm.memory.write(1000 * PAGE, b"ab")
    log_of(running).begin()
    assert await written(running) == set()
    log_of(running).end()
    await running.store(700, 2)
    log_of(running).begin()
    assert await written(running) == set()


async def test_a_log_that_is_turned_off_and_on_begins_anew(running: MemoryGuest) -> None:
    log = log_of(running)
    log.begin()
    await running.store(700, 1)
    log.end()
    log.begin()
    await running.store(701, 1)
    assert await written(running) == {701}


def test_host_writes_are_taken_once() -> None:
    writes = HostWrites(16 * PAGE)
    writes.add(0, 1)
    writes.begin()
    writes.add(3 * PAGE, PAGE + 1)
    assert writes.take().runs() == [(3 * PAGE, 2 * PAGE)]
    assert writes.take().runs() == []
    writes.add(0, 1)
    writes.end()
    writes.begin()
    assert writes.take().runs() == []
