"""Snapshots of the public VM on /dev/kvm: taken, restored, cloned, refused. The guest is tests/guests/kvm/foreign.S."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import attrs
import orjson
import pytest

from asyncvmm import VM, ConfigError, StateError, VMConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotFailed, SnapshotMismatch, TriggerImpossible
from asyncvmm.events.snapshot_types import (
    RestoreFirstExit,
    RestoreFirstGuestEvent,
    RestoreMapped,
    SnapshotSaved,
    SnapshotTrigger,
)
from asyncvmm.events.types import Event, RestoreProfileEvent, RuntimeRestoreProfileEvent
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.snapshot.predicates import after, console, idle
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import Snapshot

pytestmark = pytest.mark.anyio

PATIENCE_S = 60

Make = Callable[..., VM]


@pytest.fixture
def vm(guest: Callable[[str], Path]) -> Make:
    """A VM whose guest does what ``program`` says."""

    def make(program: str, **options: Any) -> VM:
        options = {"boot_timeout_s": 30.0, "stall_timeout_s": 20.0, **options}
        return VM(VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=4, accel="kvm", **options))

    return make


async def echoed(vm: VM, text: bytes) -> bytes:
    """What an echoing guest says to ``text``, as much as that was."""
    reader = vm.console.subscribe()
    await vm.console.write(text)
    answer = b""
    with anyio.fail_after(PATIENCE_S):
        while len(answer) < len(text):
            answer += await anext(reader)
    await reader.aclose()
    return answer


# -- taken and restored ------------------------------------------------------------------------------------------------


async def test_a_vm_runs_on_after_its_snapshot_and_so_does_one_made_of_it(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            assert original.state == "ready"
            async with await VM.restore(snapshot) as restored:
                assert restored.state == "ready"
                assert await echoed(restored, b"restored") == b"restored"
                assert await echoed(original, b"original") == b"original"


async def test_a_snapshot_by_name_can_be_restored_after_its_vm_has_gone(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        snapshot = await original.snapshot(out=tmp_path / "s", then="stop")
        assert original.state == "stopped"
        snapshot.close()
    async with await VM.restore(tmp_path / "s") as restored:
        assert await echoed(restored, b"again") == b"again"


async def test_a_snapshot_without_a_name_goes_when_it_is_closed(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            assert (snapshot.path / "manifest.json").exists()
    assert not snapshot.path.parent.exists()


async def test_a_restored_vm_can_be_saved_and_restored_again(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with (
            await original.snapshot() as first,
            await VM.restore(first) as child,
            await child.snapshot() as second,
            await VM.restore(second) as grandchild,
        ):
            assert await echoed(grandchild, b"three") == b"three"


async def test_a_paused_vm_stays_paused_and_its_clone_can_be_kept_so(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        await original.pause()
        async with await original.snapshot() as snapshot:
            assert original.state == "paused"
            async with await VM.restore(snapshot, paused=True) as restored:
                assert restored.state == "paused"
                await restored.resume()
                assert await echoed(restored, b"x") == b"x"


async def test_each_step_is_an_event_that_fits_the_schema(vm: Make) -> None:
    told: list[Event] = []
    async with vm("RE") as original:
        original.events.attach(told.append)
        await original.boot()
        async with (
            await original.snapshot() as snapshot,
            await VM.restore(snapshot, prepare=lambda new: watched(new, told)) as restored,
        ):
            await echoed(restored, b"x")
            assert restored.restore_profile is not None
            assert restored.restore_profile.total_with_resume
    kinds = [type(event) for event in told]
    assert kinds.index(SnapshotTrigger) < kinds.index(SnapshotSaved) < kinds.index(RestoreMapped)
    assert RestoreProfileEvent in kinds
    assert RestoreFirstGuestEvent in kinds
    (saved,) = (event for event in told if isinstance(event, SnapshotSaved))
    assert saved.trigger_ns <= saved.paused_ns <= saved.saved_ns
    assert (saved.snapshot, saved.logical_bytes, saved.difference) == (snapshot.id, 4 << 20, False)


def watched(vm: VM, told: list[Event]) -> None:
    vm.events.attach(told.append)


async def test_clones_are_as_many_as_asked_for_and_apart(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot, snapshot.clones(5) as clones:
            answers = [await echoed(clone, b"%d" % number) for number, clone in enumerate(clones)]
            assert answers == [b"0", b"1", b"2", b"3", b"4"]
            assert len({clone.name for clone in clones}) == 5
    assert [clone.state for clone in clones] == ["stopped"] * 5


async def test_the_identity_hook_sees_each_clone_before_the_block_does(vm: Make) -> None:
    seen: list[int] = []

    async def identify(clone: VM, number: int) -> None:
        assert clone.state == "ready"
        seen.append(number)

    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot, snapshot.clones(3, identity=identify):
            assert sorted(seen) == [0, 1, 2]


async def test_a_difference_restores_over_its_base(vm: Make, tmp_path: Path) -> None:
    async with vm("RE", track_dirty=True) as original:
        await original.boot()
        full = await original.snapshot(out=tmp_path / "full")
        await echoed(original, b"abc")
        difference = await original.snapshot(out=tmp_path / "difference", base=full)
    assert difference.manifest.memory.data_bytes <= full.manifest.memory.data_bytes
    with full.loaded, difference.loaded:
        async with await VM.restore(tmp_path / "difference") as restored:
            assert await echoed(restored, b"def") == b"def"


async def test_a_vm_can_be_restored_in_a_shell_that_was_made_ahead(vm: Make) -> None:
    told: list[Event] = []
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot, ShellPool(snapshot, size=2) as shells:
            assert shells.ready == 2
            for text in (b"one", b"two", b"three"):
                new = await VM.restore(snapshot, shells=shells, prepare=lambda made: watched(made, told))
                async with new:
                    assert await echoed(new, text) == text
                    assert new.runtime_restore_profile is not None
                    assert new.restore_profile is None
            await shells.fill()
            assert shells.ready == 2
        with pytest.raises(StateError):
            await shells.fill()
    assert [type(event) for event in told].count(RuntimeRestoreProfileEvent) == 3
    assert [type(event) for event in told].count(RestoreFirstExit) == 3


async def test_a_shell_of_another_shape_is_refused(vm: Make) -> None:
    async with vm("RE") as original, vm("RE", vcpus=2) as larger:
        await original.boot()
        await larger.boot()
        async with await original.snapshot() as small, await larger.snapshot() as large, ShellPool(small) as shells:
            with pytest.raises(ConfigError):
                await VM.restore(large, shells=shells)


async def test_what_the_first_restore_needed_is_known_to_the_next(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            async with await VM.restore(snapshot) as first:
                await echoed(first, b"x")
            assert snapshot.working_set.touched
            assert (snapshot.path / "working-set.json").exists()
            async with await VM.restore(snapshot) as second:
                assert await echoed(second, b"y") == b"y"


async def test_a_restored_vm_that_keeps_account_can_save_a_difference_of_what_it_was_made_of(
    vm: Make, tmp_path: Path
) -> None:
    async with vm("RE") as original:
        await original.boot()
        (await original.snapshot(out=tmp_path / "base")).close()
    async with await Snapshot.load(tmp_path / "base") as base, await VM.restore(base, track_dirty=True) as restored:
        await echoed(restored, b"abc")
        (await restored.snapshot(out=tmp_path / "difference", base=base)).close()
    async with await VM.restore(tmp_path / "difference") as again:
        assert await echoed(again, b"def") == b"def"


async def test_a_guest_that_ends_at_once_is_handed_out_as_it_is(vm: Make) -> None:
    async with vm("RWO") as original:
        await original.boot()
        await original.pause()
        async with await original.snapshot() as snapshot:
            await original.resume()
            await original.console.write(b"x")
            with anyio.fail_after(PATIENCE_S):
                assert await original.events.stopped == "shutdown"
            async with await VM.restore(snapshot, paused=True) as restored:
                await restored.resume()
                await restored.console.write(b"x")
                with anyio.fail_after(PATIENCE_S):
                    assert await restored.events.stopped == "shutdown"
                assert restored.state == "stopped"


# -- triggers ----------------------------------------------------------------------------------------------------------


async def test_a_snapshot_waits_for_what_the_console_says(vm: Make) -> None:
    taken: list[Snapshot] = []
    async with vm("RE") as original:
        await original.boot()

        async def take() -> None:
            taken.append(await original.snapshot(console(rb"go.now") | after(60_000)))

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                group.start_soon(take)
                await echoed(original, b"not yet\n")
                assert taken == []
                await echoed(original, b"go now\n")
    taken[0].close()


async def test_a_clock_on_the_wall_fires_too(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot(SnapshotResources(after_ms=20, quiesce_ms=5)) as snapshot:
            assert snapshot.manifest.extra["trigger"]["trigger"] == "after"


async def test_an_idle_guest_fires(vm: Make) -> None:
    async with vm("RH") as original:
        await original.boot()
        async with await original.snapshot(idle(0.05)) as snapshot:
            assert snapshot.manifest.extra["trigger"]["trigger"] == "predicate"


async def test_what_a_dead_guest_can_no_longer_do_is_an_error(vm: Make) -> None:
    async with vm("RWO") as original, anyio.create_task_group() as group:
        await original.boot()

        async def take() -> None:
            with pytest.raises(TriggerImpossible):
                await original.snapshot(console(rb"never"))

        group.start_soon(take)
        await anyio.sleep(0.05)
        await original.console.write(b"x")


# -- closed, and cancelled -------------------------------------------------------------------------------------------


async def test_a_closed_snapshot_makes_no_more_vms(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        snapshot = await original.snapshot()
        snapshot.close()
        with pytest.raises(StateError):
            await VM.restore(snapshot)
        with pytest.raises(StateError):
            async with snapshot.clones(2):
                pass
        with pytest.raises(StateError):
            await original.snapshot(base=snapshot)


async def test_a_restore_under_way_keeps_the_files_of_a_snapshot_that_is_closed(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        snapshot = await original.snapshot()
        async with await VM.restore(snapshot, prepare=lambda new: snapshot.close()) as restored:
            assert await echoed(restored, b"alive") == b"alive"
        assert not snapshot.path.exists()


async def test_whoever_is_cancelled_leaves_neither_descriptors_nor_directories(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        (await original.snapshot(out=tmp_path / "s")).close()
        (await Snapshot.load(tmp_path / "s")).close()
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(40):
            for work in (Snapshot.load(tmp_path / "s"), original.snapshot(out=tmp_path / f"{turn}")):
                task = asyncio.ensure_future(work)
                await asyncio.sleep(turn * 0.0003)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    (await task).close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert original.state == "ready"
        assert [name for name in os.listdir(tmp_path) if not (tmp_path / name / "manifest.json").exists()] == []
        assert await echoed(original, b"alive") == b"alive"


async def test_a_base_that_would_go_before_its_difference_is_refused(vm: Make, tmp_path: Path) -> None:
    async with vm("RE", track_dirty=True) as original:
        await original.boot()
        async with await original.snapshot() as full:
            with pytest.raises(ConfigError):
                await original.snapshot(base=full, out=tmp_path / "difference")
            async with await original.snapshot(base=full) as difference:
                assert difference.manifest.base is not None
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("asked", [{"when": "now"}, {"base": "dir"}])
async def test_what_is_no_order_is_refused(vm: Make, asked: dict[str, Any]) -> None:
    async with vm("RE") as original:
        await original.boot()
        with pytest.raises(ConfigError):
            await original.snapshot(**asked)


@pytest.mark.parametrize("snapshot", [None, 3, b"x"])
async def test_what_is_no_snapshot_cannot_be_restored(snapshot: Any) -> None:
    with pytest.raises(ConfigError):
        await VM.restore(snapshot)


async def test_a_state_that_says_nothing_of_the_guest_is_damage(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot(out=tmp_path / "s") as snapshot:
            sections = {name: data for name, data in snapshot.loaded.sections.items() if name != "guest"}
            draft = SnapshotDirectory.create(tmp_path / "other")
            MemoryWriter(draft.memory_fd, snapshot.manifest.memory.size)
            draft.commit(attrs.evolve(snapshot.manifest, id=draft.id), sections, MemoryMap(size=4 << 20))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SnapshotDamaged):
            await Snapshot.load(tmp_path / "other")
        assert len(os.listdir("/proc/self/fd")) == before


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_vm_that_does_not_run_cannot_be_saved(vm: Make) -> None:
    original = vm("RE")
    with pytest.raises(StateError):
        await original.snapshot()
    await original.boot()
    await original.stop()
    with pytest.raises(StateError):
        await original.snapshot()


async def test_two_snapshots_at_once_are_one_too_many(vm: Make) -> None:
    outcomes: list[object] = []

    async def take(original: VM) -> None:
        try:
            outcomes.append(await original.snapshot())
        except StateError as error:
            outcomes.append(error)

    async with vm("RE") as original:
        await original.boot()
        async with anyio.create_task_group() as group:
            group.start_soon(take, original)
            group.start_soon(take, original)
        assert await echoed(original, b"alive") == b"alive"
    taken = [outcome for outcome in outcomes if isinstance(outcome, Snapshot)]
    assert len(outcomes) == 2
    assert taken
    for snapshot in taken:
        snapshot.close()


async def test_a_path_that_is_taken_is_refused_before_anything_is_waited_for(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        with pytest.raises(SnapshotFailed):
            await original.snapshot(console(rb"never"), out=tmp_path)
        assert await echoed(original, b"alive") == b"alive"


async def test_a_difference_of_a_vm_that_keeps_no_account_is_refused(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as full:
            with pytest.raises(SnapshotFailed):
                await original.snapshot(base=full)
        assert original.state == "ready"
        assert await echoed(original, b"alive") == b"alive"


async def test_a_cancelled_snapshot_leaves_nothing_and_the_vm_as_it_was(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        with anyio.move_on_after(0.05):
            await original.snapshot(console(rb"never"), out=tmp_path / "s")
        assert os.listdir(tmp_path) == []
        assert await echoed(original, b"alive") == b"alive"


async def test_stop_ends_a_snapshot_that_waits(vm: Make, tmp_path: Path) -> None:
    original = vm("RE")
    await original.boot()
    async with anyio.create_task_group() as group:

        async def take() -> None:
            with pytest.raises((StateError, TriggerImpossible)):
                await original.snapshot(console(rb"never"), out=tmp_path / "s")

        group.start_soon(take)
        await anyio.sleep(0.02)
        await original.stop()
    assert os.listdir(tmp_path) == []


async def test_a_damaged_snapshot_is_refused_with_nothing_started(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        (await original.snapshot(out=tmp_path / "s")).close()
    state = tmp_path / "s" / "state.bin"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(SnapshotDamaged):
        await VM.restore(tmp_path / "s")
    with pytest.raises(SnapshotError):
        await VM.restore(tmp_path / "nothing")


async def test_another_machine_is_no_place_to_restore_it(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError):
                await VM.restore(snapshot, configure=lambda config: VMConfig(memory_mib=8))
            with pytest.raises(ConfigError), anyio.fail_after(PATIENCE_S):
                async with snapshot.clones(0):
                    pass
            with pytest.raises(ConfigError):
                async with snapshot.clones(100_000):
                    pass


async def test_another_format_is_another_version(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        (await original.snapshot(out=tmp_path / "s")).close()
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_bytes(orjson.dumps({**orjson.loads(manifest.read_bytes()), "format": 99}))
    with pytest.raises(SnapshotMismatch):
        await VM.restore(tmp_path / "s")
