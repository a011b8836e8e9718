"""Restores that begin on a thread of their own before their VM is there: they are the same restores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.events.base import Event
from asyncvmm.events.snapshot_types import RestoreFirstExit, RestoreMapped
from asyncvmm.events.types import PhaseEnded, RestoreProfileEvent, RuntimeRestoreProfileEvent
from asyncvmm.machine.kvm import launch as launch_module
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.launch import Launch, PreparedLaunch
from asyncvmm.machine.kvm.state.setting import TscPlan
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed
from tests.support.launched import (
    MEMORY_MIB,
    PATIENCE_S,
    PLAIN,
    PREFETCHED,
    Ready,
    await_a_runner,
    faulty,
    hear,
    kvm_of,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("prefetch", [False, True])
async def test_a_launched_guest_goes_on_where_it_was_saved(
    ready: Ready, launches: list[Launch], prefetch: bool
) -> None:
    async with ready("RE") as snapshot:
        for text in (b"one", b"two"):
            async with await VM.restore(snapshot, prefetch=prefetch) as vm:
                assert vm.state == "ready"
                assert await echoed(vm, text) == text
                await vm.pause()
                await vm.resume()
                assert await echoed(vm, b"again") == b"again"
    assert len(launches) >= 1
    assert all(launch.opened for launch in launches)


async def test_what_the_first_guest_needed_is_there_for_the_second(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        async with await VM.restore(snapshot) as first:
            assert await echoed(first, b"x") == b"x"
        assert snapshot.working_set.touched
        del launches[:]
        await in_thread(await_a_runner)
        async with await VM.restore(snapshot) as second:
            present, _ = await kvm_of(second).working_set()
            assert sum(size for _, size in present) >= sum(size for _, size in snapshot.working_set.touched)
            assert await echoed(second, b"y") == b"y"
    assert launches


async def test_what_is_needed_is_made_present_though_it_was_found_while_a_launch_was_prepared(
    guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, prepare_launch = threading.Event(), launch_module.prepare_launch

    def take_a_while(*arguments: Any, **options: Any) -> PreparedLaunch | None:
        prepared = prepare_launch(*arguments, **options)
        if not begun.is_set():
            begun.set()
            time.sleep(0.3)
        return prepared

    monkeypatch.setattr(launch_module, "prepare_launch", take_a_while)
    async with VM(VMConfig(kernel=guest("foreign"), cmdline="RE", memory_mib=MEMORY_MIB, accel="kvm")) as original:
        await original.boot()
        snapshot = await original.snapshot(then="stop")
    async with snapshot:
        async with await VM.restore(snapshot) as vm:
            await in_thread(begun.wait)
            assert await echoed(vm, b"x") == b"x"
        assert snapshot.working_set.touched
        wanted = prepare_launch(snapshot.restore_plan(), in_shell=False)
        assert wanted is not None
        assert snapshot.prepared[PREFETCHED].chain.program is wanted.chain.program


async def test_launched_vms_do_not_see_each_other(ready: Ready, launches: list[Launch]) -> None:
    async with (
        ready("RE") as snapshot,
        await VM.restore(snapshot, prefetch=False) as one,
        await VM.restore(snapshot, prefetch=False) as other,
    ):
        assert await echoed(one, b"one") == b"one"
        assert await echoed(other, b"other") == b"other"
        assert one.console.tail.endswith(b"one")
    assert launches


async def test_a_launch_in_a_shell_uses_it_up(ready: Ready, launches: list[Launch]) -> None:
    told: list[Event] = []
    async with ready("RE") as snapshot, ShellPool(snapshot, size=2) as shells:
        restore = VM.restore(snapshot, prefetch=False, shells=shells, prepare=lambda vm: hear(vm, told))
        async with await restore as vm:
            assert shells.ready == 1
            assert await echoed(vm, b"x") == b"x"
    assert launches
    assert RuntimeRestoreProfileEvent in map(type, told)


async def test_a_launch_tells_what_every_restore_tells(ready: Ready, launches: list[Launch]) -> None:
    told: list[Event] = []
    async with ready("RE") as snapshot:
        restore = VM.restore(snapshot, prefetch=False, prepare=lambda vm: hear(vm, told))
        async with await restore as vm:
            await echoed(vm, b"x")
            marks = kvm_of(vm).restored
            assert marks is not None
            assert None not in (marks.resumed_ns, marks.entered_ns, marks.first_exit_ns)
            assert marks.faults.minor > 0
            assert kvm_of(vm).page_faults().minor >= marks.faults.minor
    assert launches
    (mapped,) = (event for event in told if isinstance(event, RestoreMapped))
    (first,) = (event for event in told if isinstance(event, RestoreFirstExit))
    assert 0 < mapped.duration_ns < first.duration_ns
    assert 0 < mapped.t_ns < first.t_ns
    (profile,) = (event.profile for event in told if isinstance(event, RestoreProfileEvent))
    assert profile.resume_kvm_run is not None
    assert all(phase.start_ns >= 0 for phase in told if isinstance(phase, PhaseEnded))


async def test_a_vm_that_is_to_be_paused_is_held(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot, await VM.restore(snapshot, prefetch=False, paused=True) as vm:
        assert vm.state == "paused"
        assert kvm_of(vm).progress() == 0
        await vm.resume()
        assert await echoed(vm, b"x") == b"x"
    assert [launch.opened for launch in launches] == [False]


async def test_no_guest_runs_before_its_vm_was_prepared(ready: Ready, launches: list[Launch]) -> None:
    ends: list[int] = []

    def take_a_while(_: VM) -> None:
        time.sleep(0.01)
        ends.append(time.monotonic_ns())

    async with ready("RE") as snapshot, await VM.restore(snapshot, prefetch=False, prepare=take_a_while) as vm:
        await echoed(vm, b"x")
        marks = kvm_of(vm).restored
        assert marks is not None
        assert marks.entered_ns is not None
        assert marks.entered_ns > ends[0]
    assert launches


async def test_a_guest_that_makes_no_exit_is_handed_out_and_obeys(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RH") as snapshot:
        with anyio.fail_after(PATIENCE_S):
            async with await VM.restore(snapshot, prefetch=False) as vm:
                assert vm.state == "ready"
                await vm.pause()
                async with await vm.snapshot(then="stop") as again:
                    assert again.manifest.vcpus == 1
    assert launches


async def test_a_launched_vm_can_be_saved_at_once(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        async with await VM.restore(snapshot, prefetch=False) as vm:
            again = await vm.snapshot(then="stop")
        async with again, await VM.restore(again) as vm:
            assert await echoed(vm, b"x") == b"x"
    assert launches


async def test_a_guest_that_is_paused_at_its_first_exit_has_what_it_read(
    grasping: Snapshot, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_run = Launch._first_run

    def answered_late(self: Launch) -> Any:
        time.sleep(0.1)
        return first_run(self)

    monkeypatch.setattr(Launch, "_first_run", answered_late)
    async with await VM.restore(grasping) as vm:
        await vm.pause()
        again = await vm.snapshot(then="stop")
    assert [launch.opened for launch in launches] == [True]
    assert not vm.console.tail
    readers: list[ConsoleReader] = []
    restore = VM.restore(again, prepare=lambda vm: readers.append(vm.console.subscribe()))
    async with again, await restore:
        with anyio.fail_after(PATIENCE_S):
            assert await anext(readers[0]) == b"x"


async def test_a_launched_vm_keeps_account_of_what_is_written(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        async with await VM.restore(snapshot, prefetch=False, track_dirty=True):
            pass
        await in_thread(await_a_runner)
        del launches[:]
        async with await VM.restore(snapshot, prefetch=False, track_dirty=True) as vm:
            assert await echoed(vm, b"x") == b"x"
            difference = await vm.snapshot(base=snapshot)
        assert launches
        assert difference.manifest.memory.is_difference
        async with difference, await VM.restore(difference) as again:
            assert await echoed(again, b"y") == b"y"


async def test_a_host_that_is_not_as_was_foreseen_has_the_restore_done_anew(
    ready: Ready, launches: list[Launch]
) -> None:
    async with ready("RE") as snapshot:
        faulty(snapshot, PLAIN, tsc=TscPlan(by_offset=False))
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert vm.state == "ready"
            assert await echoed(vm, b"x") == b"x"
    assert launches


async def test_without_an_idle_runner_a_restore_needs_none(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        busy = []
        while (idle := runner.take()) is not None:
            busy.append(idle)
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"
        for idle in busy:
            runner.give_back(idle)
    assert not launches
