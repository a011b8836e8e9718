"""VMs whose vCPUs have dirty rings know what they wrote: all of it, however small the rings are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.errors import HostError, KvmIoctlError
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.abi import Capability
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.dirty import DirtyLog
from asyncvmm.machine.kvm.dirty_ring import DirtyRing
from asyncvmm.machine.kvm.launch import prepare_launch
from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.machine.kvm.restore_chains import ShellShape, with_rings
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.kvm.ring_shape import (
    KINDS,
    PAYS_FROM_BYTES,
    RING_BYTES,
    RingShape,
    enters_guests,
    largest,
    ring_shape,
    within,
)
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline
from tests.support.holdings import Holdings
from tests.support.memory_guest import (
    OWN_PAGES,
    PAGE,
    SMALLEST_RING,
    Files,
    MemoryGuest,
    New,
    Save,
    booted,
    new_guest,
    restored,
)

pytestmark = pytest.mark.anyio
MIB = 1 << 20
FILL_BYTES = 10
"""Of the command: the guest begins when it has the last."""


def ring_of(guest: MemoryGuest) -> DirtyRing:
    log = guest.machine._building.log
    assert isinstance(log, DirtyRing)
    return log


def overflows(guest: MemoryGuest) -> int:
    entry = guest.run.exits.by_reason.get("DIRTY_RING_FULL")
    return entry.count if entry else 0


def numbers_in(pages: PageSet) -> set[int]:
    return {page for offset, size in pages.runs() for page in range(offset // PAGE, (offset + size) // PAGE)}


async def written(guest: MemoryGuest) -> set[int]:
    """The guest's own left out: it writes to them at any time."""
    await guest.machine.pause()
    log, pages = guest.machine._building.log, PageSet(len(guest.view))
    assert log is not None
    log.collect([pages])
    await guest.machine.resume()
    return {page for page in numbers_in(pages) if page >= OWN_PAGES}


# -- what is found -----------------------------------------------------------------------------------------------------


async def test_rings_find_just_the_pages_that_bitmaps_find(new: New) -> None:
    chance = random.Random(5)
    async with (
        booted(new(track_dirty=True, ring_bytes=0)) as one,
        booted(new(track_dirty=True, ring_bytes=65536)) as two,
    ):
        assert type(one.machine._building.log) is DirtyLog
        for guest in (one, two):
            await guest.fill(OWN_PAGES, 3000, 1)
            await written(guest)
        for _ in range(10):
            places = [(chance.randrange(OWN_PAGES, 3000), chance.randrange(1, 80)) for _ in range(6)]
            for guest in (one, two):
                for page, count in places:
                    await guest.fill(page, count, chance.randrange(256))
            expected = {page for first, count in places for page in range(first, first + count)}
            assert await written(one) == await written(two) == expected


async def test_a_ring_that_is_full_many_times_over_loses_nothing(new: New) -> None:
    async with booted(new(track_dirty=True, ring_bytes=SMALLEST_RING)) as guest:
        await written(guest)
        before = overflows(guest)
        for page in (1000, 600):
            await guest.fill(page, 3000, 7)
        assert overflows(guest) - before >= 5
        assert await written(guest) == set(range(600, 4000))
        await guest.store(700, 1)
        assert await written(guest) == {700}


async def test_a_chain_of_differences_told_by_a_small_ring_is_what_was_written(new: New, files: Files) -> None:
    """Saved ahead or not, restored in between or not: always with more written than the ring holds."""
    chance = random.Random(11)
    async with booted(new(track_dirty=True, ring_bytes=SMALLEST_RING)) as guest:
        await guest.machine.pause()
        save = await named(files.saved(await guest.machine.save(files.writer(16 * MIB))), guest, "0")
        await guest.machine.resume()
        save = await lengthened(guest, files, save, range(1, 4), chance)
        assert overflows(guest) >= 5
    plan = save.plan(track_dirty=True, ring_bytes=SMALLEST_RING)
    async with restored(new(), plan) as guest:
        assert await save.is_memory_of(guest)
        guest.machine.saved_as("3")
        await guest.machine.resume()
        await guest.end_dirtying()
        save = await lengthened(guest, files, save, range(4, 7), chance)
        assert overflows(guest) >= 5
        end = guest.memory()
    assert await in_thread(lambda: save.memory() == end)


async def lengthened(guest: MemoryGuest, files: Files, save: Save, names: range, chance: random.Random) -> Save:
    for name in names:
        for _ in range(3):
            await guest.fill(chance.randrange(600, 1500), chance.randrange(1000, 2500), chance.randrange(256))
        writer = files.writer(16 * MIB, difference=True)
        if name % 2:
            await guest.begin_dirtying(600, 3000, 3000)
            await guest.machine.precopy(writer)
        await guest.machine.pause()
        save = await named(
            files.saved(await guest.machine.save(writer, difference_of=f"{name - 1}"), save), guest, f"{name}"
        )
        await guest.machine.resume()
        if name % 2:
            await guest.end_dirtying()
    return save


async def named(save: Save, guest: MemoryGuest, name: str) -> Save:
    assert await save.is_memory_of(guest)
    guest.machine.saved_as(name)
    return save


async def test_what_is_written_while_others_look_is_found_by_somebody(new: New) -> None:
    """The vCPU's thread makes room in the ring and another collects, at the same time."""
    async with booted(new(track_dirty=True, ring_bytes=SMALLEST_RING)) as guest:
        log, pages, done = ring_of(guest), PageSet(len(guest.view)), False

        def collect() -> None:
            while not done:
                log.collect([pages])

        async with anyio.create_task_group() as group:
            group.start_soon(in_thread, collect)
            for value in range(3):
                await guest.fill(600, 3400, value)
            done = True
        await guest.machine.pause()
        log.collect([pages])
        assert numbers_in(pages) >= set(range(600, 4000))
        await guest.machine.resume()


@pytest.mark.parametrize("ring_bytes", [65536, 1 << 20])
async def test_two_vcpus_have_a_ring_each(smp: NewSmp, files: Files, ring_bytes: int) -> None:
    async with booted(smp(ring_bytes)) as both:
        await both.machine.pause()
        whole = await files.save(both)
        both.machine.saved_as("whole")
        await both.machine.resume()
        for _ in range(3):
            assert await both._ask(b"x") == b"k"
            assert await written(both) == set(range(OWN_PAGES, OWN_PAGES + 3000))
        assert await both._ask(b"x") == b"k"
        await both.machine.pause()
        assert not ring_of(both).is_overrun
        less = await files.save(both, whole, "whole")
    assert await in_thread(lambda: counts_in(less.memory())) == {OWN_PAGES + page: 4 for page in range(3000)}
    assert less.machine.memory.data_bytes <= 3100 * PAGE


@pytest.mark.parametrize("ring_bytes", [SMALLEST_RING, 2 * SMALLEST_RING])
async def test_nothing_is_lost_of_a_ring_that_is_overrun(smp: NewSmp, files: Files, ring_bytes: int) -> None:
    """It is where KVM emulates the guest, here in ring 0; a larger one unless KVM is made to look at it in time, as by
    much else that goes on. Elsewhere the smallest is full, and no more than that."""
    async with booted(smp(ring_bytes)) as both:
        await both.machine.pause()
        save = await named(await files.save(both), both, "0")
        await both.machine.resume()
        for name in range(1, 5):
            for _ in range(3):
                assert await both._ask(b"x") == b"k"
            await both.machine.pause()
            save = await named(await files.save(both, save, f"{name - 1}"), both, f"{name}")
            await both.machine.resume()
        has_room = ring_bytes > SMALLEST_RING
        assert has_room or ring_of(both).is_overrun or enters_guests()
        assert (0 if has_room else 1) <= overflows(both) < 1000
        assert await both._ask(b"x") == b"k"


async def test_a_ring_that_was_overrun_and_still_is_full_does_not_keep_its_guest_out(new: New) -> None:
    """Rings are given up in parts, without a look at what is in them, only as often as the kernel says that it must."""
    async with booted(new(track_dirty=True, ring_bytes=SMALLEST_RING)) as guest:
        log, skips = ring_of(guest), 0
        give_up_some = log._rings[0].give_up_some

        def noted() -> None:
            nonlocal skips
            skips += 1
            give_up_some()

        log._rings[0].give_up_some = noted  # type: ignore[method-assign]
        log.is_overrun = True
        await guest.fill(600, 3400, 1)  # its log is on still, so that the ring is full, time and again
        assert 3 <= skips <= overflows(guest) <= 100
        assert len(await written(guest)) == 4096 - OWN_PAGES


NewSmp = Callable[[int], MemoryGuest]


@pytest.fixture
def smp(guest: Callable[[str], Path]) -> NewSmp:
    """Two vCPUs that write to 3000 pages when they are told to, with rings of that size."""
    return lambda size: new_guest(guest("smp_dirty"), vcpus=2, track_dirty=True, ring_bytes=size)


def counts_in(memory: bytes) -> dict[int, int]:
    """The first words of pages that the guest has not for itself, but for zeros."""
    found = {page: int.from_bytes(memory[page * PAGE : page * PAGE + 4], "little") for page in range(OWN_PAGES, 4096)}
    return {page: count for page, count in found.items() if count}


# -- at which moment ---------------------------------------------------------------------------------------------------


async def test_a_guest_is_paused_at_any_moment_of_filling_its_ring(new: New, files: Files) -> None:
    async with booted(new(track_dirty=True, ring_bytes=SMALLEST_RING)) as guest:
        await guest.machine.pause()
        save = await named(await files.save(guest), guest, "0")
        await guest.machine.resume()
        async with anyio.create_task_group() as group:
            group.start_soon(guest.fill, 600, 3400, 3)
            for name in range(1, 30):
                await anyio.sleep(0.001)
                await guest.machine.pause()
                save = await named(await files.save(guest, save, f"{name - 1}"), guest, f"{name}")
                await guest.machine.resume()


@pytest.fixture
async def filling(new: New, files: Files) -> Save:
    """Of a guest that has begun to fill 60 MiB of its 64, and makes no exit before it is done."""
    async with booted(new(memory_mib=64)) as guest, anyio.create_task_group() as group:
        heard = guest.run.count("in 0x3f8")
        group.start_soon(guest.fill, 1000, 15360, 3)
        while guest.run.count("in 0x3f8") < heard + FILL_BYTES:
            await anyio.lowlevel.checkpoint()
        await guest.machine.pause()
        save = await files.save(guest)
        await guest.machine.resume()
    return save


async def goes_on(guest: MemoryGuest, files: Files, whole: Save) -> None:
    """It fills the rest of its memory, and what it wrote is known."""
    await guest.run.said(b"k")
    assert overflows(guest) >= 2
    await guest.machine.pause()
    less = await files.save(guest, whole, "whole")
    assert await less.is_memory_of(guest)


async def test_the_first_exit_of_a_restored_guest_may_be_that_its_ring_is_full(
    new: New, files: Files, filling: Save
) -> None:
    shape = ShellShape(memory_bytes=64 * MIB, vcpus=1, track_dirty=True, ring=ring_shape(64 * MIB, SMALLEST_RING))
    for shell in (None, await in_thread(lambda: Shell(shape, Timeline()))):
        plan = filling.plan(track_dirty=True, ring_bytes=SMALLEST_RING)
        async with restored(new(memory_mib=64), plan, shell) as guest:
            guest.machine.saved_as("whole")
            await guest.machine.resume()
            await goes_on(guest, files, filling)


@pytest.mark.parametrize("enters", [True, False])
async def test_the_first_exit_of_a_launched_guest_may_be_that_its_ring_is_full(
    new: New, files: Files, filling: Save, enters: bool
) -> None:
    plan = filling.plan(track_dirty=True, ring_bytes=SMALLEST_RING)
    prepared = await in_thread(lambda: prepare_launch(plan, in_shell=False))
    if prepared is None:
        pytest.skip("this host restores without launching")
    await in_thread(await_a_runner)
    launch, guest = prepared.begin(enters), new(memory_mib=64)
    assert launch is not None
    try:
        await guest.machine.restore(plan, launch=launch)
        guest.machine.saved_as("whole")
        assert guest.machine.is_running == enters
        if not enters:
            await guest.machine.resume()
        await goes_on(guest, files, filling)
    finally:
        await guest.machine.stop()
        await launch.aclose()


def await_a_runner() -> None:
    runner.make_one()
    while not runner.any_idle():
        time.sleep(0.001)


# -- whether there are any ---------------------------------------------------------------------------------------------


def test_rings_are_for_large_memories_unless_they_are_asked_for() -> None:
    most = largest()
    assert most is not None
    usual = RingShape(most.capability, RING_BYTES)
    assert ring_shape(PAYS_FROM_BYTES - PAGE) is None
    assert ring_shape(PAYS_FROM_BYTES) == (usual if enters_guests() else None)
    assert ring_shape(PAGE, RING_BYTES) == usual
    assert ring_shape(PAYS_FROM_BYTES, 0) is None
    assert ring_shape(PAGE, 1 << 40) == most
    large = ShellShape(memory_bytes=PAYS_FROM_BYTES, vcpus=1, track_dirty=True)
    assert with_rings(large).ring == ring_shape(PAYS_FROM_BYTES)
    assert with_rings(ShellShape(memory_bytes=PAYS_FROM_BYTES, vcpus=1)).ring is None


@pytest.mark.parametrize(
    ("module", "parameter", "value", "expected"),
    [
        ("kvm_intel", "unrestricted_guest", "Y", True),
        ("kvm_intel", "unrestricted_guest", "N", False),
        ("kvm_amd", "npt", "Y", True),
        ("kvm_amd", "npt", "1", True),
        ("kvm_pvm", "ept", "Y", False),
    ],
)
def test_a_kvm_that_emulates_its_guests_is_told_by_its_module(
    tmp_path: Path, module: str, parameter: str, value: str, expected: bool
) -> None:
    """There, rings are overrun."""
    directory = tmp_path / module / "parameters"
    directory.mkdir(parents=True)
    (directory / parameter).write_text(f"{value}\n")
    assert enters_guests(tmp_path) is expected


def test_a_host_without_them_has_none() -> None:
    assert within(RING_BYTES, largest((0x7FFF_FFFF,))) is None
    assert largest((0x7FFF_FFFF, *KINDS)) == largest()


def test_the_older_kind_does_as_well() -> None:
    most = largest((Capability.KVM_CAP_DIRTY_LOG_RING,))
    assert most is not None
    vm = KvmVm(blueprint(4 * MIB, 2, track_dirty=True, ring=within(RING_BYTES, most)), Timeline())
    try:
        assert [ring.entries for ring in vm.rings] == [RING_BYTES // 16] * 2
    finally:
        vm.close()


async def test_without_rings_differences_are_told_by_bitmaps(new: New, files: Files) -> None:
    async with booted(new(track_dirty=True)) as guest:
        assert type(guest.machine._building.log) is DirtyLog
        await guest.machine.pause()
        whole = await named(await files.save(guest), guest, "whole")
    plan = whole.plan(track_dirty=True, ring_bytes=0)
    async with restored(new(), plan) as guest:
        assert type(guest.machine._building.log) is DirtyLog
        guest.machine.saved_as("whole")
        await guest.machine.resume()
        await guest.fill(700, 50, 3)
        await guest.machine.pause()
        assert await (await files.save(guest, whole, "whole")).is_memory_of(guest)


async def test_a_vm_with_rings_leaves_nothing(new: New, files: Files, holdings: Callable[..., Holdings]) -> None:
    before = holdings(16 * MIB)
    async with booted(new(track_dirty=True, ring_bytes=65536)) as guest:
        await guest.fill(600, 100, 1)
        await guest.machine.pause()
        await files.save(guest)
        assert holdings(16 * MIB) != before
    files.close()
    assert holdings(16 * MIB) == before


@pytest.mark.parametrize("ring_bytes", [1, 3 << 12])
async def test_a_ring_that_cannot_be_is_refused(new: New, ring_bytes: int) -> None:
    guest = new(track_dirty=True, ring_bytes=ring_bytes)
    with pytest.raises(KvmIoctlError) as caught:
        await guest.machine.start()
    assert caught.value.ioctl == "KVM_ENABLE_CAP"


async def test_a_vm_that_keeps_no_account_has_no_rings(new: New) -> None:
    async with booted(new(ring_bytes=65536)) as guest:
        vm = guest.machine._vm
        assert vm is not None
        assert vm.rings == ()
        assert type(guest.machine._building.log) is DirtyLog


# -- a kernel that says what cannot be ---------------------------------------------------------------------------------


async def test_an_entry_about_no_page_of_memory_fails_the_save_and_the_guest_runs_on(new: New, files: Files) -> None:
    async with booted(new(track_dirty=True, ring_bytes=65536)) as guest:
        await guest.machine.pause()
        vm, log = guest.machine._vm, ring_of(guest)
        assert vm is not None
        log.collect([])
        ring = vm.rings[0]
        ring._words[4 * ring._next : 4 * ring._next + 4] = memoryview(b"\1\0\0\0" + b"\7\0\0\0" + bytes(8)).cast("I")
        for _ in range(2):
            with pytest.raises(HostError, match="slot 7"):
                await files.save(guest)
        ring._words[4 * ring._next] = 0
        await guest.machine.resume()
        assert await guest.count() == 1
