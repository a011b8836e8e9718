"""What a launch that is armed has made ahead: /dev/kvm opened and the snapshot's pages mapped, none of them present."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asyncvmm import VM
from asyncvmm.machine.kvm.launch import Launch
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed
from tests.support.launched import MEMORY_MIB, PLAIN, Ready

pytestmark = pytest.mark.anyio

PAGE = mmap.PAGESIZE
ROOM = 16 << 20
"""Too little for the guest's memory."""


async def test_what_is_armed_has_the_pages_mapped_and_holds_none(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        address, _ = mapped(snapshot)
        sizes = resident_and_whole(address)
        assert sum(resident for resident, _ in sizes) == 0
        assert sum(whole for _, whole in sizes) == MEMORY_MIB << 10


async def test_a_restore_runs_in_the_memory_that_was_mapped_ahead(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        address, _ = mapped(snapshot)
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"
            assert any(resident for resident, _ in resident_and_whole(address))


async def test_what_was_made_ahead_took_no_time_of_the_restore(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot, await VM.restore(snapshot, prefetch=False) as vm:
        await echoed(vm, b"x")
        phases = {phase.name: phase for phase in vm.timeline.phases}
        assert launches[0]._ahead.steps
        assert phases["kvm_open"].duration_ns == phases["memory_state_write"].duration_ns == 0
        assert phases["kvm_create_vm"].duration_ns > 0
        assert all(phase.start_ns >= vm.timeline.start_ns for phase in phases.values())


async def test_a_launch_that_is_lost_leaves_nothing_mapped_or_open(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        address, others = mapped(snapshot)
        before = devices()
        snapshot.prepared[PLAIN]._armed.clear()
        gc.collect()
        await asyncio.sleep(0)
        assert not resident_and_whole(address)
        assert devices() == before - 1
        assert others


async def test_a_child_that_was_forked_unmaps_nothing_of_its_own(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        address, size = mapped(snapshot)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
            child = os.fork()
        if not child:
            code = 2
            try:
                code = 0 if is_kept(snapshot, address, size) else 1
            finally:
                os._exit(code)
        _, status = await in_thread(lambda: os.waitpid(child, 0))
        assert os.waitstatus_to_exitcode(status) == 0
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"


async def test_where_there_is_no_room_ahead_there_may_be_when_it_is_wanted(
    ready: Ready, launches: list[Launch]
) -> None:
    async with ready("RE") as snapshot:
        prepared = snapshot.prepared[PLAIN]
        prepared.disarm()
        await asyncio.sleep(0)
        before = devices()
        with room_for(ROOM):
            prepared.arm()
        assert prepared._armed[0]._ahead.steps == 0
        assert devices() == before
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"
            assert len(launches) == 1


# -- what this process has ---------------------------------------------------------------------------------------------


def mapped(snapshot: Snapshot) -> tuple[int, int]:
    """Where what is armed has the guest's memory."""
    launch = snapshot.prepared[PLAIN]._armed[0]
    memory = launch._chain.steps.memory
    assert launch._ahead.steps > 3
    return launch._made(0)[memory], MEMORY_MIB << 20


def resident_and_whole(address: int) -> list[tuple[int, int]]:
    """KiB of each mapping in the guest's memory."""
    end, found, inside = address + (MEMORY_MIB << 20), [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = address <= int(span[1], 16) < end and int(span[2], 16) <= end
        elif inside and line.startswith("Size:"):
            whole = int(line.split()[1])
        elif inside and line.startswith("Rss:"):
            found.append((int(line.split()[1]), whole))
    return found


def devices() -> int:
    """Descriptors of /dev/kvm."""
    names = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(name) == "/dev/kvm" for name in names if os.path.lexists(name))


def is_kept(snapshot: Snapshot, address: int, size: int) -> bool:
    """In a child: whether pages of its own, where the guest's memory was, outlast what the child does not have."""
    ours = [mmap.mmap(-1, size) for _ in range(4)]  # one of them fits there
    before = len(resident_and_whole(address))
    snapshot.prepared[PLAIN].disarm()
    snapshot.prepared.clear()
    gc.collect()
    return before > 0 and len(resident_and_whole(address)) == before and len(ours) == 4


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """As much address space is left, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
