"""Snapshots of a VM that are refused, closed or cancelled: nothing is left, and the VM is as it was."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import attrs
import orjson
import pytest

from asyncvmm import VM, ConfigError, ShellPool, SnapshotResources, StateError, VMConfig
from asyncvmm.config import Accel
from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotFailed, SnapshotMismatch, TriggerImpossible
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.snapshot.predicates import console
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed
from tests.support.launched import disarm

pytestmark = pytest.mark.anyio
PATIENCE_S = 60
Make = Callable[..., VM]


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


async def test_a_child_of_the_process_does_not_remove_its_snapshots(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
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


async def test_a_restore_under_way_keeps_the_files_of_a_snapshot_that_is_closed(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        snapshot = await original.snapshot()
        async with await VM.restore(snapshot, prepare=lambda new: snapshot.close()) as restored:
            assert await echoed(restored, b"alive") == b"alive"
        assert not snapshot.path.exists()


@pytest.mark.parametrize("earlier", [0, 3])
async def test_a_memory_file_that_is_cut_off_after_it_was_loaded_is_refused(
    vm: Make, tmp_path: Path, earlier: int
) -> None:
    async with vm("RE") as original:
        await original.boot()
        snapshot = await original.snapshot(out=tmp_path / "s", then="stop")
    async with snapshot:
        for _ in range(earlier):  # later ones are launched
            async with await VM.restore(snapshot):
                pass
        disarm(snapshot)
        before = len(os.listdir("/proc/self/fd"))
        os.truncate(tmp_path / "s" / "memory.bin", 4096)
        with pytest.raises(SnapshotDamaged, match=r"memory\.bin"):
            await VM.restore(snapshot)
        assert len(os.listdir("/proc/self/fd")) == before


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


@pytest.mark.parametrize("snapshot", [None, 3, b"x", ""])
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
            manifest, memory = attrs.evolve(snapshot.manifest, id=draft.id), MemoryMap(size=4 << 20)
        await in_thread(lambda: draft.commit(manifest, sections, memory))
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
            with pytest.raises(SnapshotFailed, match="track_dirty=True"):
                await original.snapshot(base=full)
        assert original.state == "ready"
        assert await echoed(original, b"alive") == b"alive"


async def test_a_difference_of_any_but_the_last_snapshot_is_refused_with_both_paths(vm: Make, tmp_path: Path) -> None:
    async with vm("RE", track_dirty=True) as original, vm("RE", track_dirty=True) as other:
        await original.boot()
        await other.boot()
        first = await original.snapshot(out=tmp_path / "first")
        with pytest.raises(SnapshotFailed, match=f"it has none: .*without base= .*found {first.path}"):
            await other.snapshot(base=first)
        second = await original.snapshot(out=tmp_path / "second", base=first)
        with pytest.raises(SnapshotFailed, match=f"last snapshot, {second.path} .*found {first.path}"):
            await original.snapshot(console(rb"never"), base=first)  # before anything is waited for
        third = await original.snapshot(out=tmp_path / "third", base=second)
        for snapshot in (first, second, third):
            snapshot.close()


async def test_a_base_that_is_the_last_one_no_more_when_the_trigger_comes_is_refused(vm: Make, tmp_path: Path) -> None:
    async with vm("RE", track_dirty=True) as original:
        await original.boot()
        first = await original.snapshot(out=tmp_path / "first")
        async with anyio.create_task_group() as group:

            async def late() -> None:
                with pytest.raises(SnapshotFailed, match=f"last snapshot, {tmp_path}/second .*found {first.path}"):
                    await original.snapshot(console(rb"now"), base=first, out=tmp_path / "late")

            group.start_soon(late)
            await anyio.sleep(0.05)
            (await original.snapshot(out=tmp_path / "second")).close()
            assert await echoed(original, b"now") == b"now"
        first.close()
        assert sorted(os.listdir(tmp_path)) == ["first", "second"]


async def test_the_first_base_of_a_restored_vm_is_what_it_was_made_of(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        await original.boot()
        made_of = await original.snapshot(out=tmp_path / "made-of")
        other = await original.snapshot(out=tmp_path / "other")
        async with await VM.restore(made_of, track_dirty=True) as restored:
            with pytest.raises(SnapshotFailed, match=f"last snapshot, {made_of.path} .*found {other.path}"):
                await restored.snapshot(base=other)
            (await restored.snapshot(base=made_of)).close()
    made_of.close()
    other.close()


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


@pytest.mark.parametrize("change", [{"accel": "qemu"}, {"workload": ("true",)}, {"env": ("A=b",)}, {"vcpus": 2}])
async def test_what_a_restored_vm_cannot_be_any_more_is_refused(vm: Make, change: dict[str, Any]) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match=f"restored {next(iter(change))}"):
                await VM.restore(snapshot, configure=lambda config: attrs.evolve(config, **change))


@pytest.mark.parametrize("asked", [False, True])
async def test_account_is_kept_for_who_asks_the_restore_for_it(vm: Make, asked: bool) -> None:
    async with vm("RE", track_dirty=True) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            match = rf"restored track_dirty: expected VM.restore\(track_dirty={not asked}\)"
            with pytest.raises(ConfigError, match=match):
                await VM.restore(
                    snapshot,
                    track_dirty=asked,
                    configure=lambda config: attrs.evolve(config, track_dirty=not asked),
                )


async def test_an_async_configure_is_refused_and_nothing_is_left_to_be_awaited(
    vm: Make, recwarn: pytest.WarningsRecorder
) -> None:
    async def never(config: VMConfig) -> VMConfig:
        return config

    configure: Any = never
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match="configure"):
                await VM.restore(snapshot, configure=configure)
    gc.collect()
    assert not [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)]


@pytest.mark.parametrize("accel", ["auto", "kvm"])
async def test_the_machine_that_it_is_can_be_asked_for(vm: Make, accel: Accel) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with (
            await original.snapshot() as snapshot,
            await VM.restore(snapshot, configure=lambda config: attrs.evolve(config, accel=accel)) as restored,
        ):
            assert restored.config.accel == accel


async def test_another_machine_is_no_place_to_restore_it(vm: Make) -> None:
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


@pytest.mark.parametrize("snapshot", [None, "dir"])
async def test_shells_are_made_of_a_snapshot(snapshot: Any) -> None:
    with pytest.raises(ConfigError, match="shells: expected a Snapshot"):
        ShellPool(snapshot)


@pytest.mark.parametrize("hook", ["identity", "prepare", "configure"])
async def test_a_hook_that_cannot_be_called_is_refused_before_a_clone_is_made(vm: Make, hook: str) -> None:
    async with vm("RE") as original:
        await original.boot()
        wrong: dict[str, Any] = {hook: 3}
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match=f"{hook}: expected "):
                async with snapshot.clones(2, **wrong):
                    pass


async def test_an_identity_hook_that_is_not_async_is_refused_and_nothing_is_left(vm: Make) -> None:
    seen: list[VM] = []

    def identify(new: VM, number: int) -> None:
        seen.append(new)

    wrong: Any = identify
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match=r"identity: expected an async function .*found None"):
                async with snapshot.clones(2, identity=wrong):
                    pass
    assert {new.state for new in seen} == {"stopped"}


async def test_a_snapshots_repr_says_which_it_is(vm: Make) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            shown = repr(snapshot)
            assert shown.startswith(f"<Snapshot {snapshot.id} of kvm, 4 MiB, at {snapshot.path}")
        assert repr(snapshot).endswith(" closed>")


# -- told ------------------------------------------------------------------------------------------------------------


def _told(vm: VM) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    vm.events.attach(lambda event: told.append({"event": event.event} | event.details()))
    return told


def _failures(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in told if event["event"] == "snapshot.failed"]


async def test_a_snapshot_that_failed_is_an_event_with_the_errors_facts(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        told = _told(original)
        with pytest.raises(StateError) as early:
            await original.snapshot(out=tmp_path / "s")
        await original.boot()
        with pytest.raises(SnapshotFailed) as taken:
            await original.snapshot(out=tmp_path)
        await original.stop()
        with pytest.raises(StateError) as late:
            await original.snapshot()
    first, second, third = _failures(told)
    assert first == {
        "event": "snapshot.failed",
        "kind": "StateError",
        "what": "snapshot",
        "expected": early.value.expected,
        "state": "new",
        "path": str(tmp_path / "s"),
    }
    assert (second["kind"], second["found"]) == ("SnapshotFailed", str(taken.value.found))
    assert (third["kind"], third["state"]) == ("StateError", late.value.state)


async def test_a_snapshot_that_nobody_waits_for_any_more_is_told_of_with_what_had_come(vm: Make) -> None:
    async with vm("RE") as original:
        told = _told(original)
        await original.boot()
        with anyio.move_on_after(0.1):
            await original.snapshot(SnapshotResources(after_ms=0, quiesce_ms=60_000))
        with anyio.move_on_after(0.1):
            await original.snapshot(console(rb"never"))
        async with await original.snapshot():
            assert [(event["kind"], event.get("trigger")) for event in _failures(told)] == [
                ("CancelledError", "after"),
                ("CancelledError", None),
            ]


async def test_a_snapshot_that_the_vms_end_ends_is_told_of(vm: Make) -> None:
    async with vm("RE") as original, anyio.create_task_group() as group:
        told = _told(original)
        await original.boot()

        async def wait() -> None:
            with pytest.raises(StateError):
                await original.snapshot(console(rb"never"))

        group.start_soon(wait)
        await anyio.sleep(0.05)
        await original.stop()
        assert [event["kind"] for event in _failures(told)] == ["CancelledError"]


@pytest.mark.parametrize("option", ["prefetch", "track_dirty", "paused"])
@pytest.mark.parametrize("value", [[], "no", 1, None])
async def test_what_is_neither_true_nor_false_is_refused(vm: Make, option: str, value: Any) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            for _ in range(2):  # the second one may be launched
                with pytest.raises(ConfigError, match=f"{option}: expected True or False"):
                    await VM.restore(snapshot, **{option: value})
                async with await VM.restore(snapshot):
                    pass


@pytest.mark.parametrize("hook", ["prepare", "configure"])
async def test_a_hook_that_cannot_be_called_is_refused(vm: Make, hook: str) -> None:
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            options: dict[str, Any] = {hook: 5}
            with pytest.raises(ConfigError, match=f"{hook}: expected a function, found 5"):
                await VM.restore(snapshot, **options)


async def test_an_async_prepare_is_refused_for_nobody_would_await_it(vm: Make) -> None:
    async def never(*_: object) -> None:
        raise AssertionError

    prepare: Any = never
    async with vm("RE") as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            with pytest.raises(ConfigError, match="prepare: expected a plain function"):
                await VM.restore(snapshot, prepare=prepare)
            with pytest.raises(ConfigError, match="prepare: expected a plain function"):
                async with snapshot.clones(2, prepare=prepare):
                    pass
