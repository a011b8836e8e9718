"""The files of a VM's snapshots: damaged ones are refused, and those that nobody is to have are not left behind."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import attrs
import orjson
import pytest

from asyncvmm import VM, StateError
from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch, TriggerImpossible
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.snapshot.predicates import console
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed
from tests.support.launched import disarm

pytestmark = pytest.mark.anyio


@pytest.fixture
async def saved(vm: Callable[..., VM], tmp_path: Path) -> Path:
    """A snapshot's directory. The VM that it was taken of has stopped."""
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot(out=tmp_path / "s", then="stop") as snapshot:
            return snapshot.path


def descriptors() -> int:
    """How many are open."""
    return len(os.listdir("/proc/self/fd"))


# -- damaged -----------------------------------------------------------------------------------------------------------


async def test_a_damaged_snapshot_is_refused_with_nothing_started(saved: Path) -> None:
    state = saved / "state.bin"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(SnapshotDamaged):
        await VM.restore(saved)


async def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError):
        await VM.restore(tmp_path / "nothing")


async def test_another_format_is_another_version(saved: Path) -> None:
    manifest = saved / "manifest.json"
    manifest.write_bytes(orjson.dumps({**orjson.loads(manifest.read_bytes()), "format": 99}))
    with pytest.raises(SnapshotMismatch):
        await VM.restore(saved)


@pytest.mark.parametrize("earlier", [0, 3])
async def test_a_memory_file_that_is_cut_off_after_it_was_loaded_is_refused(saved: Path, earlier: int) -> None:
    async with await Snapshot.load(saved) as snapshot:
        for _ in range(earlier):  # later ones are launched
            async with await VM.restore(snapshot):
                pass
        disarm(snapshot)
        before = descriptors()
        os.truncate(saved / "memory.bin", 4096)
        with pytest.raises(SnapshotDamaged, match=r"memory\.bin"):
            await VM.restore(snapshot)
        assert descriptors() == before


async def test_a_state_that_says_nothing_of_the_guest_is_damage(original: VM, tmp_path: Path) -> None:
    async with await original.snapshot(out=tmp_path / "s") as snapshot:
        sections = {name: data for name, data in snapshot.loaded.sections.items() if name != "guest"}
        draft = SnapshotDirectory.create(tmp_path / "other")
        MemoryWriter(draft.memory_fd, snapshot.manifest.memory.size)
        manifest, memory = attrs.evolve(snapshot.manifest, id=draft.id), MemoryMap(size=4 << 20)
    await in_thread(lambda: draft.commit(manifest, sections, memory))
    before = descriptors()
    with pytest.raises(SnapshotDamaged):
        await Snapshot.load(tmp_path / "other")
    assert descriptors() == before


# -- closed, and cancelled ---------------------------------------------------------------------------------------------


async def test_a_child_of_the_process_does_not_remove_its_snapshots(original: VM) -> None:
    async with await original.snapshot() as snapshot:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
            child = os.fork()
        if child == 0:
            try:
                snapshot.close()
            finally:
                os._exit(0)
        await in_thread(lambda: os.waitpid(child, 0))
        assert snapshot.path.exists()
    assert not snapshot.path.exists()


async def test_a_restore_under_way_keeps_the_files_of_a_snapshot_that_is_closed(original: VM) -> None:
    snapshot = await original.snapshot()
    async with await VM.restore(snapshot, prepare=lambda new: snapshot.close()) as restored:
        assert await echoed(restored, b"alive") == b"alive"
    assert not snapshot.path.exists()


async def test_whoever_is_cancelled_leaves_neither_descriptors_nor_directories(original: VM, tmp_path: Path) -> None:
    (await original.snapshot(out=tmp_path / "s")).close()
    (await Snapshot.load(tmp_path / "s")).close()
    before = descriptors()
    for turn in range(40):
        for work in (Snapshot.load(tmp_path / "s"), original.snapshot(out=tmp_path / f"{turn}")):
            task = asyncio.ensure_future(work)
            await asyncio.sleep(turn * 0.0003)
            task.cancel()
            with suppress(asyncio.CancelledError):
                (await task).close()
    assert descriptors() == before
    assert original.state == "ready"
    assert [name for name in os.listdir(tmp_path) if not (tmp_path / name / "manifest.json").exists()] == []
    assert await echoed(original, b"alive") == b"alive"


async def test_a_cancelled_snapshot_leaves_nothing_and_the_vm_as_it_was(original: VM, tmp_path: Path) -> None:
    with anyio.move_on_after(0.05):
        await original.snapshot(console(rb"never"), out=tmp_path / "s")
    assert os.listdir(tmp_path) == []
    assert await echoed(original, b"alive") == b"alive"


async def test_stop_ends_a_snapshot_that_waits(original: VM, tmp_path: Path) -> None:
    async with anyio.create_task_group() as group:

        async def take() -> None:
            with pytest.raises((StateError, TriggerImpossible)):
                await original.snapshot(console(rb"never"), out=tmp_path / "s")

        group.start_soon(take)
        await anyio.sleep(0.02)
        await original.stop()
    assert os.listdir(tmp_path) == []
