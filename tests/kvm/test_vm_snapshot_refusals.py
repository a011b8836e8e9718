"""Snapshots and restores that are asked for wrongly: refused, told of, and the VM is as it was."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm import VM, ConfigError, ShellPool, SnapshotResources, StateError, VMConfig
from asyncvmm.config import Accel
from asyncvmm.errors import SnapshotFailed
from asyncvmm.snapshot.predicates import console
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed

pytestmark = pytest.mark.anyio
PATIENCE_S = 60
Make = Callable[..., VM]


@pytest.fixture
async def snapshot(original: VM) -> AsyncIterator[Snapshot]:
    """One of a VM that has booted."""
    async with await original.snapshot() as snapshot:
        yield snapshot


# -- snapshots ---------------------------------------------------------------------------------------------------------


async def test_a_vm_that_does_not_run_cannot_be_saved(vm: Make) -> None:
    original = vm("RE")
    with pytest.raises(StateError):
        await original.snapshot()
    await original.boot()
    await original.stop()
    with pytest.raises(StateError):
        await original.snapshot()


@pytest.mark.parametrize("asked", [{"when": "now"}, {"base": "dir"}])
async def test_what_is_no_order_is_refused(original: VM, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        await original.snapshot(**asked)


async def test_two_snapshots_at_once_are_one_too_many(original: VM) -> None:
    outcomes: list[object] = []

    async def take() -> None:
        try:
            outcomes.append(await original.snapshot())
        except StateError as error:
            outcomes.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        group.start_soon(take)
    assert await echoed(original, b"alive") == b"alive"
    taken = [outcome for outcome in outcomes if isinstance(outcome, Snapshot)]
    assert len(outcomes) == 2
    assert taken
    for snapshot in taken:
        snapshot.close()


async def test_a_path_that_is_taken_is_refused_before_anything_is_waited_for(original: VM, tmp_path: Path) -> None:
    with pytest.raises(SnapshotFailed):
        await original.snapshot(console(rb"never"), out=tmp_path)
    assert await echoed(original, b"alive") == b"alive"


async def test_a_snapshots_repr_says_which_it_is(snapshot: Snapshot) -> None:
    assert repr(snapshot).startswith(f"<Snapshot {snapshot.id} of kvm, 4 MiB, at {snapshot.path}")
    snapshot.close()
    assert repr(snapshot).endswith(" closed>")


async def test_a_closed_snapshot_makes_no_more_vms(original: VM, snapshot: Snapshot) -> None:
    snapshot.close()
    with pytest.raises(StateError):
        await VM.restore(snapshot)
    with pytest.raises(StateError):
        async with snapshot.clones(2):
            pass
    with pytest.raises(StateError):
        await original.snapshot(base=snapshot)


# -- their bases -------------------------------------------------------------------------------------------------------


async def test_a_base_that_would_go_before_its_difference_is_refused(vm: Make, tmp_path: Path) -> None:
    async with vm("RE", track_dirty=True) as original:
        await original.boot()
        async with await original.snapshot() as full:
            with pytest.raises(ConfigError):
                await original.snapshot(base=full, out=tmp_path / "difference")
            async with await original.snapshot(base=full) as difference:
                assert difference.manifest.base is not None
        assert os.listdir(tmp_path) == []


async def test_a_difference_of_a_vm_that_keeps_no_account_is_refused(original: VM, snapshot: Snapshot) -> None:
    with pytest.raises(SnapshotFailed, match="track_dirty=True"):
        await original.snapshot(base=snapshot)
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


async def test_the_first_base_of_a_restored_vm_is_what_it_was_made_of(original: VM, tmp_path: Path) -> None:
    made_of = await original.snapshot(out=tmp_path / "made-of")
    other = await original.snapshot(out=tmp_path / "other")
    async with await VM.restore(made_of, track_dirty=True) as restored:
        with pytest.raises(SnapshotFailed, match=f"last snapshot, {made_of.path} .*found {other.path}"):
            await restored.snapshot(base=other)
        (await restored.snapshot(base=made_of)).close()
    made_of.close()
    other.close()


# -- restores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 3, b"x", ""])
async def test_what_is_no_snapshot_cannot_be_restored(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        await VM.restore(wrong)


@pytest.mark.parametrize("wrong", [None, "dir"])
async def test_shells_are_made_of_a_snapshot(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="shells: expected a Snapshot"):
        ShellPool(wrong)


@pytest.mark.parametrize("change", [{"accel": "qemu"}, {"workload": ("true",)}, {"env": ("A=b",)}, {"vcpus": 2}])
async def test_what_a_restored_vm_cannot_be_any_more_is_refused(snapshot: Snapshot, change: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("accel", ["auto", "kvm"])
async def test_the_machine_that_it_is_can_be_asked_for(snapshot: Snapshot, accel: Accel) -> None:
    async with await VM.restore(snapshot, configure=lambda config: attrs.evolve(config, accel=accel)) as restored:
        assert restored.config.accel == accel


async def test_another_machine_is_no_place_to_restore_it(snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError):
        await VM.restore(snapshot, configure=lambda config: VMConfig(memory_mib=8))


@pytest.mark.parametrize("count", [0, 100_000])
async def test_none_and_too_many_clones_are_refused(snapshot: Snapshot, count: int) -> None:
    with pytest.raises(ConfigError), anyio.fail_after(PATIENCE_S):
        async with snapshot.clones(count):
            pass


@pytest.mark.parametrize("option", ["prefetch", "track_dirty", "paused"])
@pytest.mark.parametrize("value", [[], "no", 1, None])
async def test_what_is_neither_true_nor_false_is_refused(snapshot: Snapshot, option: str, value: Any) -> None:
    for _ in range(2):  # the second one may be launched
        with pytest.raises(ConfigError, match=f"{option}: expected True or False"):
            await VM.restore(snapshot, **{option: value})
        async with await VM.restore(snapshot):
            pass


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["prepare", "configure"])
async def test_a_hook_that_cannot_be_called_is_refused(snapshot: Snapshot, hook: str) -> None:
    wrong: dict[str, Any] = {hook: 5}
    with pytest.raises(ConfigError, match=f"{hook}: expected a function, found 5"):
        await VM.restore(snapshot, **wrong)


@pytest.mark.parametrize("hook", ["identity", "prepare", "configure"])
async def test_a_hook_that_cannot_be_called_is_refused_before_a_clone_is_made(snapshot: Snapshot, hook: str) -> None:
    wrong: dict[str, Any] = {hook: 3}
    with pytest.raises(ConfigError, match=f"{hook}: expected "):
        async with snapshot.clones(2, **wrong):
            pass


@pytest.mark.parametrize("hook", ["prepare", "configure"])
async def test_an_async_hook_is_refused_and_nothing_is_left_to_be_awaited(
    snapshot: Snapshot, hook: str, recwarn: pytest.WarningsRecorder
) -> None:
    async def never(*_: object) -> None:
        raise AssertionError

    wrong: dict[str, Any] = {hook: never}
    with pytest.raises(ConfigError, match=f"{hook}: expected a plain function"):
        await VM.restore(snapshot, **wrong)
    with pytest.raises(ConfigError, match=f"{hook}: expected a plain function"):
        async with snapshot.clones(2, **wrong):
            pass
    gc.collect()
    assert not [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)]


async def test_an_identity_hook_that_is_not_async_is_refused_and_nothing_is_left(snapshot: Snapshot) -> None:
    seen: list[VM] = []

    def identify(new: VM, number: int) -> None:
        seen.append(new)

    wrong: Any = identify
    with pytest.raises(ConfigError, match=r"identity: expected an async function .*found None"):
        async with snapshot.clones(2, identity=wrong):
            pass
    assert {new.state for new in seen} == {"stopped"}


# -- told --------------------------------------------------------------------------------------------------------------


def failures_of(vm: VM) -> list[dict[str, Any]]:
    """What comes to be told of its snapshots that fail."""
    told: list[dict[str, Any]] = []
    vm.events.attach(lambda event: told.append(event.details()) if event.event == "snapshot.failed" else None)
    return told


async def test_a_snapshot_that_failed_is_an_event_with_the_errors_facts(vm: Make, tmp_path: Path) -> None:
    async with vm("RE") as original:
        failures = failures_of(original)
        with pytest.raises(StateError) as early:
            await original.snapshot(out=tmp_path / "s")
        await original.boot()
        with pytest.raises(SnapshotFailed) as taken:
            await original.snapshot(out=tmp_path)
        await original.stop()
        with pytest.raises(StateError) as late:
            await original.snapshot()
    first, second, third = failures
    assert first == {
        "kind": "StateError",
        "what": "snapshot",
        "expected": early.value.expected,
        "state": "new",
        "path": str(tmp_path / "s"),
    }
    assert (second["kind"], second["found"]) == ("SnapshotFailed", str(taken.value.found))
    assert (third["kind"], third["state"]) == ("StateError", late.value.state)


async def test_a_snapshot_that_nobody_waits_for_any_more_is_told_of_with_what_had_come(original: VM) -> None:
    failures = failures_of(original)
    with anyio.move_on_after(PATIENCE_S) as scope:
        original.events.attach(lambda event: scope.cancel() if event.event == "snapshot.trigger" else None)
        await original.snapshot(SnapshotResources(after_ms=0, quiesce_ms=120_000))
    with anyio.move_on_after(0.1):
        await original.snapshot(console(rb"never"))
    async with await original.snapshot():
        assert [(event["kind"], event.get("trigger")) for event in failures] == [
            ("CancelledError", "after"),
            ("CancelledError", None),
        ]


async def test_a_snapshot_that_the_vms_end_ends_is_told_of(original: VM) -> None:
    failures = failures_of(original)
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            with pytest.raises(StateError):
                await original.snapshot(console(rb"never"))

        group.start_soon(wait)
        await anyio.sleep(0.05)
        await original.stop()
    assert [event["kind"] for event in failures] == ["CancelledError"]
