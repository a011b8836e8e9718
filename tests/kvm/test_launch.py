"""Restores that begin on a thread of their own before their VM is there: the same restores, and nothing left of any.

The guest is tests/guests/kvm/foreign.S: ``E`` echoes, polling its serial port, ``H`` halts for good, and
``G`` echoes without a look whether there is anything.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm import VM, ConfigError, StateError, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.errors import HostError, SnapshotDamaged, SnapshotMismatch
from asyncvmm.events.base import Event
from asyncvmm.events.snapshot_types import RestoreFirstExit, RestoreMapped
from asyncvmm.events.types import PhaseEnded, RestoreProfileEvent, RuntimeRestoreProfileEvent
from asyncvmm.machine.kvm import launch as launch_module
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.launch import Launch, PreparedLaunch
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.state.setting import TscPlan
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot import snapshot as snapshot_module
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

MEMORY_MIB = 69
"""A size that no other mapping has."""
PATIENCE_S = 60
PLAIN, IN_SHELL, PREFETCHED = (False, False, False), (False, False, True), (True, False, False)
DELAYS_S = (0.0, 0.0001, 0.0003, 0.0005, 0.0008, 0.001, 0.0015, 0.002, 0.003, 0.005)

Ready = Callable[[str], AbstractAsyncContextManager[Snapshot]]
Count = Callable[..., Holdings]


@pytest.fixture
def ready(guest: Callable[[str], Path]) -> Ready:
    """A snapshot of a guest with that program, all kinds of whose restores are prepared."""

    @asynccontextmanager
    async def make(program: str) -> AsyncIterator[Snapshot]:
        config = VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=MEMORY_MIB, accel="kvm")
        async with VM(config) as original:
            await original.boot()
            snapshot = await original.snapshot(then="stop")
        async with snapshot:
            await prepare(snapshot)
            yield snapshot

    return make


async def prepare(snapshot: Snapshot) -> None:
    async with ShellPool(snapshot) as shells:
        for options in ({"prefetch": False}, {"prefetch": False, "shells": shells}, {}):
            async with await VM.restore(snapshot, **options):
                pass
    assert {PLAIN, IN_SHELL, PREFETCHED} <= set(snapshot.prepared)
    await in_thread(await_a_runner)


def await_a_runner() -> None:
    """It says itself when it is ready."""
    runner.make_one()
    while not runner.any_idle():
        time.sleep(0.001)


@pytest.fixture
async def grasping(guest: Callable[[str], Path]) -> AsyncIterator[Snapshot]:
    """A snapshot of a guest whose first access will take ``x`` out of its serial port; a restore of it is prepared."""
    config = VMConfig(kernel=guest("foreign"), cmdline="RG", memory_mib=MEMORY_MIB, accel="kvm")
    async with VM(config) as original:
        await original.boot()
        await original.pause()
        await kvm_of(original).write("console", b"x")
        snapshot = await original.snapshot(then="stop")
    async with snapshot:
        while PREFETCHED not in snapshot.prepared:
            async with await VM.restore(snapshot):
                await anyio.sleep(0.02)
        await in_thread(await_a_runner)
        yield snapshot


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Those that begin."""
    found: list[Launch] = []
    begin = PreparedLaunch.begin

    def noted(self: PreparedLaunch, *arguments: Any) -> Launch | None:
        launch = begin(self, *arguments)
        if launch is not None:
            found.append(launch)
        return launch

    monkeypatch.setattr(PreparedLaunch, "begin", noted)
    return found


async def echoed(vm: VM, text: bytes) -> bytes:
    reader, answer = vm.console.subscribe(), b""
    await vm.console.write(text)
    with anyio.fail_after(PATIENCE_S):
        while len(answer) < len(text):
            answer += await anext(reader)
    await reader.aclose()
    return answer


def hear(vm: VM, told: list[Event]) -> None:
    vm.events.attach(told.append)


def kvm_of(vm: VM) -> KvmMachine:
    assert isinstance(vm._machine, KvmMachine)
    return vm._machine


def faulty(snapshot: Snapshot, kind: LaunchKind, **changes: Any) -> None:
    """Have launches of that kind go wrong."""
    prepared = snapshot.prepared[kind]
    snapshot.prepared[kind] = PreparedLaunch(prepared.blueprint, attrs.evolve(prepared.chain, **changes))


# -- the same restores -------------------------------------------------------------------------------------------------


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


# -- nothing is left ---------------------------------------------------------------------------------------------------


def held(count: Count) -> Holdings:
    return count(MEMORY_MIB << 20)


@pytest.mark.parametrize("program", ["RE", "RH"])
async def test_a_launch_that_is_cancelled_at_some_moment_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], program: str
) -> None:
    async with ready(program) as snapshot:
        before = held(holdings)
        for delay_s in DELAYS_S:
            with anyio.move_on_after(delay_s):
                async with await VM.restore(snapshot, prefetch=False):
                    pass
            assert held(holdings) == before
            await prepare(snapshot)
            before = held(holdings)
    assert launches


@pytest.mark.parametrize("delay_s", DELAYS_S[:6])
async def test_a_launch_in_a_shell_that_is_cancelled_leaves_nothing_of_it(
    ready: Ready, holdings: Count, launches: list[Launch], delay_s: float
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings)
        async with ShellPool(snapshot) as shells:
            with anyio.move_on_after(delay_s):
                async with await VM.restore(snapshot, prefetch=False, shells=shells):
                    pass
        assert held(holdings) == before
    assert launches


async def test_a_hook_that_fails_leaves_nothing(ready: Ready, holdings: Count, launches: list[Launch]) -> None:
    def fail(_: object) -> Any:
        raise ZeroDivisionError

    async with ready("RE") as snapshot:
        before = held(holdings)
        with pytest.raises(ZeroDivisionError):
            await VM.restore(snapshot, prefetch=False, prepare=fail)
        with pytest.raises(ZeroDivisionError):
            await VM.restore(snapshot, prefetch=False, configure=fail)
        assert held(holdings) == before
    assert launches


@pytest.mark.parametrize("kind", [PLAIN, IN_SHELL])
async def test_a_memory_file_that_fails_is_a_typed_error_and_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], kind: LaunchKind
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings)
        chain = snapshot.prepared[kind].chain
        read_only = os.open("/proc/self/stat", os.O_RDONLY)
        faulty(snapshot, kind, given=(*chain.given[:2], read_only))
        async with ShellPool(snapshot) as shells:
            with pytest.raises(SnapshotDamaged):
                await VM.restore(snapshot, prefetch=False, shells=shells if kind == IN_SHELL else None)
        os.close(read_only)
        assert held(holdings) == before
    assert launches


async def test_a_state_that_kvm_refuses_is_a_typed_error_and_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch]
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings)
        given = snapshot.prepared[PLAIN].chain.given
        faulty(snapshot, PLAIN, given=(8, *given[1:]))  # no address of ours
        with pytest.raises(SnapshotMismatch):
            await VM.restore(snapshot, prefetch=False)
        assert held(holdings) == before
    assert launches


async def test_a_vm_that_is_stopped_while_it_is_launched_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch]
) -> None:
    stopping: list[asyncio.Task[None]] = []
    made: list[VM] = []

    def stop_soon(vm: VM) -> None:
        made.append(vm)
        stopping.append(asyncio.ensure_future(vm.stop()))

    async with ready("RE") as snapshot:
        before = held(holdings)
        with suppress(StateError):  # unless the restore was as good as done
            await VM.restore(snapshot, prefetch=False, prepare=stop_soon)
        await stopping.pop()
        assert made.pop().state == "stopped"
        assert held(holdings) == before
    assert launches


async def test_a_machine_that_is_stopped_while_it_is_launched_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = Launch.mapped
    async with ready("RE") as snapshot:
        before = held(holdings)

        async def stopped_before(self: Launch) -> None:
            assert made
            await made[0]._machine.stop()  # type: ignore[union-attr]
            await mapped(self)

        made: list[VM] = []
        monkeypatch.setattr(Launch, "mapped", stopped_before)
        with pytest.raises(StateError):
            await VM.restore(snapshot, prefetch=False, prepare=made.append)
        made.clear()
        assert held(holdings) == before
    assert launches


async def test_no_descriptor_to_be_had_is_an_error_that_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(24, "Too many open files")

    async with ready("RE") as snapshot:
        before = held(holdings)
        eventfd = os.eventfd
        monkeypatch.setattr(os, "eventfd", none)
        with pytest.raises((HostError, OSError), match="Too many"):
            await VM.restore(snapshot, prefetch=False)
        monkeypatch.setattr(os, "eventfd", eventfd)
        assert held(holdings) == before
    assert launches


async def test_a_launch_that_a_signal_breaks_off_leaves_nothing_and_its_runner_serves_again(
    ready: Ready, holdings: Count, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise ZeroDivisionError  # as a signal's handler may, at any moment

    async with ready("RE") as snapshot:
        before = held(holdings)
        with monkeypatch.context() as patched:
            patched.setattr(os, "eventfd", interrupted)
            with pytest.raises(ZeroDivisionError):
                await VM.restore(snapshot, prefetch=False)
        assert held(holdings) == before
        await in_thread(await_a_runner)
        assert len(set(runner._idle)) == len(runner._idle)
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"
    assert launches


async def test_a_failure_that_nobody_waits_for_any_more_is_not_complained_of(
    ready: Ready, launches: list[Launch]
) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def fail(_: object) -> Any:
        time.sleep(0.05)  # the launch has failed meanwhile
        raise ZeroDivisionError

    async with ready("RE") as snapshot, ShellPool(snapshot) as shells:
        faulty(snapshot, IN_SHELL, given=(8, *snapshot.prepared[IN_SHELL].chain.given[1:]))  # no address of ours
        with pytest.raises(ZeroDivisionError):
            await VM.restore(snapshot, prefetch=False, shells=shells, prepare=fail)
    assert launches
    del launches[:]
    gc.collect()
    assert not complaints


async def test_few_idle_runners_are_kept(ready: Ready) -> None:
    async with ready("RE") as snapshot, snapshot.clones(12) as vms:
        for vm in vms:
            assert await echoed(vm, b"x") == b"x"
    assert sum(thread.name == runner.IDLE_NAME for thread in threading.enumerate()) <= runner.MOST_IDLE


# -- shells ------------------------------------------------------------------------------------------------------------


async def test_what_is_no_pool_of_shells_is_refused(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        wrong: Any
        for wrong in ([], True, "shells"):
            with pytest.raises(ConfigError, match="shells"):
                await VM.restore(snapshot, shells=wrong)


async def test_a_closed_pool_is_refused(ready: Ready, holdings: Count) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings)
        async with ShellPool(snapshot) as shells:
            pass
        with pytest.raises(StateError):
            await VM.restore(snapshot, prefetch=False, shells=shells)
        assert held(holdings) == before


@pytest.mark.parametrize("delay_s", [0.0, 0.0003, 0.001])
async def test_whoever_is_cancelled_while_a_shell_is_made_leaves_none(
    ready: Ready, holdings: Count, delay_s: float
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings)
        shells, vm = ShellPool(snapshot), None
        with anyio.move_on_after(delay_s):
            vm = await VM.restore(snapshot, prefetch=False, shells=shells)
        if vm is not None:  # it was as quick as that
            await vm.stop()
        await shells.aclose()
        assert held(holdings) == before


async def test_the_last_to_use_a_closed_snapshot_removes_it_beside_the_loop(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    remove = shutil.rmtree

    def noted(*arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread())
        remove(*arguments, **options)

    async with ready("RE") as snapshot:
        assert snapshot.is_temporary
        monkeypatch.setattr(shutil, "rmtree", noted)
        async with await VM.restore(snapshot, prefetch=False, prepare=lambda _: snapshot.close()) as vm:
            assert await echoed(vm, b"x") == b"x"
            assert not snapshot.path.exists()
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("by_name", [False, True])
async def test_a_restore_cancelled_while_its_snapshot_is_let_go_leaves_no_vm(
    ready: Ready, holdings: Count, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    let_go = snapshot_module._let_go

    def take_a_while(*arguments: Any) -> None:
        time.sleep(0.3)
        let_go(*arguments)

    async with ready("RE") as snapshot:
        before = held(holdings)
        monkeypatch.setattr(snapshot_module, "_let_go", take_a_while)
        copy = await Snapshot.load(snapshot.path)
        if by_name:
            restoring = asyncio.ensure_future(VM.restore(snapshot.path))
        else:
            restoring = asyncio.ensure_future(VM.restore(copy, prepare=lambda _: copy.close()))
        await asyncio.sleep(0.15)
        restoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await restoring
        await copy.aclose()
        after = held(holdings)
        assert (after.threads, after.mappings) == (before.threads, before.mappings)
