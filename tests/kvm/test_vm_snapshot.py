"""Snapshots of the public VM on /dev/kvm: taken, restored, cloned, refused. The guest is tests/guests/kvm/foreign.S."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VM, ConfigError, StateError
from asyncvmm.errors import TriggerImpossible
from asyncvmm.events.snapshot_types import (
    RestoreFirstExit,
    RestoreFirstGuestEvent,
    RestoreMapped,
    SnapshotFailedEvent,
    SnapshotSaved,
    SnapshotTrigger,
)
from asyncvmm.events.types import Event, RestoreProfileEvent, RuntimeRestoreProfileEvent, VmState
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.directory import SnapshotDirectory
from asyncvmm.snapshot.predicate import Predicate, Tracker
from asyncvmm.snapshot.predicates import after, console, idle
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed

pytestmark = pytest.mark.anyio
PATIENCE_S = 60
Make = Callable[..., VM]


# -- told of -----------------------------------------------------------------------------------------------------------


async def test_a_snapshot_that_nobody_waits_for_any_more_is_told_of_with_the_reason(vm: Make) -> None:
    told: list[SnapshotFailedEvent] = []

    def take(event: Event) -> None:
        if isinstance(event, SnapshotFailedEvent):
            told.append(event)

    async with vm("RE") as original, anyio.create_task_group() as group:
        original.events.attach(take)
        await original.boot()
        with anyio.move_on_after(0.01):
            await original.snapshot(console(rb"never"))

        async def wait() -> None:
            with pytest.raises(StateError):
                await original.snapshot(console(rb"never"))

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await original.stop()
    assert [event.kind for event in told] == ["CancelledError", "CancelledError"]
    assert [event.what for event in told] == ["snapshot", "snapshot"]
    assert [event.reason for event in told] == ["whoever asked for it was cancelled", "the VM was stopped"]


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


async def test_a_vm_made_of_a_snapshot_says_so_with_its_machine_as_it_starts(vm: Make) -> None:
    heard: list[VmState] = []

    def listen(machine: VM, *_: int) -> None:
        machine.events.attach(lambda event: heard.append(event) if isinstance(event, VmState) else None)

    async with vm("RE") as original:
        listen(original)
        await original.boot()
        async with await original.snapshot(then="stop") as snapshot:
            async with await VM.restore(snapshot, prepare=listen):
                pass
            async with snapshot.clones(2, prepare=listen, at_once=1):
                pass
            said = [(state.accel, state.snapshot, state.clone) for state in heard if state.state == "starting"]
            assert said == [(None, None, None), *(("kvm", snapshot.id, clone) for clone in (None, 0, 1))]
    assert all(state.accel is None for state in heard if state.state != "starting")


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


async def test_a_shell_of_another_shape_is_refused_in_words(vm: Make) -> None:
    async with vm("RE") as original, vm("RE", vcpus=2) as larger, vm("RE", rng=True) as other:
        await original.boot()
        await larger.boot()
        await other.boot()
        async with (
            await original.snapshot() as small,
            await larger.snapshot() as large,
            await other.snapshot() as with_device,
            ShellPool(small) as shells,
            ShellPool(with_device) as for_device,
        ):
            with pytest.raises(ConfigError) as caught:
                await VM.restore(large, shells=shells)
            assert str(caught.value) == "shells: expected a restore with 1 vCPU, found one with 2 vCPUs"
            with pytest.raises(ConfigError) as caught:
                await VM.restore(large, shells=shells, track_dirty=True)
            expected, found = "1 vCPU and track_dirty=False", "2 vCPUs and track_dirty=True"
            assert str(caught.value) == f"shells: expected a restore with {expected}, found one with {found}"
            for _ in range(2):  # the second one could be launched
                with pytest.raises(ConfigError) as caught:
                    await VM.restore(small, shells=for_device)
                assert str(caught.value) == "shells: expected a restore with 1 device, found one with no devices"
                with pytest.raises(ConfigError, match="expected a restore with no devices, found one with 1 device"):
                    await VM.restore(with_device, shells=shells)
                async with await VM.restore(small, shells=shells) as fitting:
                    assert await echoed(fitting, b"fits") == b"fits"


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


@pytest.mark.parametrize("saved", [False, True])
async def test_the_configuration_of_a_restored_vm_says_whether_it_keeps_account(vm: Make, saved: bool) -> None:
    async with vm("RE", track_dirty=saved) as original:
        await original.boot()
        async with await original.snapshot() as snapshot:
            for asked in (False, True, False):
                async with await VM.restore(snapshot, track_dirty=asked, name="again") as restored:
                    assert restored.config.track_dirty is asked
                    assert restored.name == "again"


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


@attrs.frozen
class Armed(Predicate):
    """Never met; tells when it is waited for."""

    armed: anyio.Event = attrs.field(factory=anyio.Event)
    never: Predicate = attrs.field(factory=lambda: console(rb"never"))

    def start(self, now_ns: int) -> Tracker:
        self.armed.set()
        return self.never.start(now_ns)

    def leaves(self) -> Iterator[Predicate]:
        return self.never.leaves()


async def is_impossible(vm: VM, when: Predicate) -> None:
    with pytest.raises(TriggerImpossible, match="the guest has ended"):
        await vm.snapshot(when)


async def test_what_a_dead_guest_can_no_longer_do_is_an_error(vm: Make) -> None:
    when = Armed()
    async with vm("RWO") as original, anyio.create_task_group() as group:
        await original.boot()
        group.start_soon(is_impossible, original, when)
        await when.armed.wait()
        await original.console.write(b"x")


async def test_so_it_is_for_a_guest_that_dies_before_its_trigger_is_waited_for(
    vm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, begun, dead = SnapshotDirectory.create, threading.Event(), threading.Event()

    def held(path: Path) -> SnapshotDirectory:
        begun.set()
        assert dead.wait(PATIENCE_S)
        return make(path)

    monkeypatch.setattr(SnapshotDirectory, "create", held)
    when = Armed()
    async with vm("RWO") as original, anyio.create_task_group() as group:
        await original.boot()
        group.start_soon(is_impossible, original, when)
        assert await in_thread(lambda: begun.wait(PATIENCE_S))
        await original.console.write(b"x")
        await original.events.stopped
        dead.set()
