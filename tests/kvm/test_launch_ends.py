"""Of restores that begin on a thread of their own nothing is left, however they end: cancelled, failed, broken off."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm import VM, ConfigError, StateError
from asyncvmm.errors import HostError, SnapshotDamaged, SnapshotMismatch
from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.launch import Launch
from asyncvmm.machine.kvm.runner import Runner
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot import snapshot as snapshot_module
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot
from tests.support.echoing import echoed
from tests.support.launched import (
    IN_SHELL,
    PLAIN,
    Count,
    Ready,
    await_a_runner,
    faulty,
    held,
    prepare,
)
from tests.support.scarcity import busy_workers, threads_left

pytestmark = pytest.mark.anyio

PATIENCE_S = 10
DELAYS_S = (0.0, 0.0001, 0.0003, 0.0005, 0.0008, 0.001, 0.0015, 0.002, 0.003, 0.005)


@pytest.mark.parametrize("program", ["RE", "RH"])
async def test_a_launch_that_is_cancelled_at_some_moment_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], program: str
) -> None:
    async with ready(program) as snapshot:
        before = held(holdings, snapshot)
        for delay_s in DELAYS_S:
            with anyio.move_on_after(delay_s):
                async with await VM.restore(snapshot, prefetch=False):
                    pass
            assert held(holdings, snapshot) == before
            await prepare(snapshot)
            before = held(holdings, snapshot)
    assert launches


@pytest.mark.parametrize("delay_s", DELAYS_S[:6])
async def test_a_launch_in_a_shell_that_is_cancelled_leaves_nothing_of_it(
    ready: Ready, holdings: Count, launches: list[Launch], delay_s: float
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        async with ShellPool(snapshot) as shells:
            with anyio.move_on_after(delay_s):
                async with await VM.restore(snapshot, prefetch=False, shells=shells):
                    pass
        assert held(holdings, snapshot) == before
    assert launches


async def test_a_hook_that_fails_leaves_nothing(ready: Ready, holdings: Count, launches: list[Launch]) -> None:
    def fail(_: object) -> Any:
        raise ZeroDivisionError

    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        with pytest.raises(ZeroDivisionError):
            await VM.restore(snapshot, prefetch=False, prepare=fail)
        with pytest.raises(ZeroDivisionError):
            await VM.restore(snapshot, prefetch=False, configure=fail)
        assert held(holdings, snapshot) == before
    assert launches


@pytest.mark.stalls  # where no thread is to be had, the loop frees
async def test_what_fails_where_no_thread_is_to_be_had_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch]
) -> None:
    def fail(_: object) -> Any:
        raise ZeroDivisionError

    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        async with busy_workers():
            with threads_left(0), pytest.raises(ZeroDivisionError):
                await VM.restore(snapshot, prefetch=False, prepare=fail)
        assert await in_thread(lambda: all(map(ends_by_itself, launches)))
        await in_thread(await_a_runner)
        assert held(holdings, snapshot) == before
    assert launches


def ends_by_itself(launch: Launch) -> bool:
    """Whether its thread comes to be done with it, though nobody joins it: that would release it."""
    ended = launch._over.acquire(timeout=PATIENCE_S)
    if ended:
        launch._over.release()
    return ended


@pytest.mark.parametrize("kind", [PLAIN, IN_SHELL])
async def test_a_memory_file_that_fails_is_a_typed_error_and_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], kind: LaunchKind
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        chain = snapshot.prepared[kind].chain
        read_only = os.open("/proc/self/stat", os.O_RDONLY)
        faulty(snapshot, kind, given=(*chain.given[:2], read_only))
        async with ShellPool(snapshot) as shells:
            with pytest.raises(SnapshotDamaged):
                await VM.restore(snapshot, prefetch=False, shells=shells if kind == IN_SHELL else None)
        os.close(read_only)
        assert held(holdings, snapshot) == before
    assert launches


async def test_a_state_that_kvm_refuses_is_a_typed_error_and_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch]
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        given = snapshot.prepared[PLAIN].chain.given
        faulty(snapshot, PLAIN, given=(8, *given[1:]))  # no address of ours
        with pytest.raises(SnapshotMismatch):
            await VM.restore(snapshot, prefetch=False)
        assert held(holdings, snapshot) == before
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
        before = held(holdings, snapshot)
        with suppress(StateError):  # unless the restore was as good as done
            await VM.restore(snapshot, prefetch=False, prepare=stop_soon)
        await stopping.pop()
        assert made.pop().state == "stopped"
        assert held(holdings, snapshot) == before
    assert launches


async def test_a_machine_that_is_stopped_while_it_is_launched_leaves_nothing(
    ready: Ready, holdings: Count, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = Launch.mapped
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)

        async def stopped_before(self: Launch) -> None:
            assert made
            await made[0]._machine.stop()  # type: ignore[union-attr]
            await mapped(self)

        made: list[VM] = []
        monkeypatch.setattr(Launch, "mapped", stopped_before)
        with pytest.raises(StateError):
            await VM.restore(snapshot, prefetch=False, prepare=made.append)
        made.clear()
        assert held(holdings, snapshot) == before
    assert launches


@pytest.mark.parametrize("armed", [False, True])
async def test_no_descriptor_to_be_had_is_an_error_that_leaves_nothing(
    ready: Ready, holdings: Count, armed: bool
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        if armed:
            snapshot.prepared[PLAIN].arm()
        with no_more_descriptors(), pytest.raises(HostError, match="Too many open files"):
            await VM.restore(snapshot, prefetch=False)
        after = held(holdings, snapshot)  # the watch for stalls has no descriptor to look with, and ends
        assert attrs.evolve(after, tasks=before.tasks) == before
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("sent", [False, True])
async def test_a_launch_that_a_signal_breaks_off_leaves_nothing_and_its_runner_serves_again(
    ready: Ready, holdings: Count, launches: list[Launch], monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    send = Runner.send

    def interrupted(self: Runner, *arguments: Any) -> None:
        if sent:
            send(self, *arguments)
        raise ZeroDivisionError  # as a signal's handler may, at any moment

    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        with monkeypatch.context() as patched:
            patched.setattr(Runner, "send", interrupted)
            with pytest.raises(ZeroDivisionError):
                await VM.restore(snapshot, prefetch=False)
        assert held(holdings, snapshot) == before
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


async def test_what_is_no_pool_of_shells_is_refused(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        wrong: Any
        for wrong in ([], True, "shells"):
            with pytest.raises(ConfigError, match="shells"):
                await VM.restore(snapshot, shells=wrong)


@pytest.mark.parametrize("option", ["prefetch", "track_dirty", "paused"])
async def test_what_is_asked_wrongly_is_refused_before_a_guest_runs(
    ready: Ready, launches: list[Launch], option: str
) -> None:
    async with ready("RE") as snapshot:
        wrong: Any = {"prefetch": False} | {option: "no"}
        with pytest.raises(ConfigError, match=f"{option}: expected True or False"):
            await VM.restore(snapshot, **wrong)
    assert not launches


async def test_a_closed_pool_is_refused(ready: Ready, holdings: Count) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        async with ShellPool(snapshot) as shells:
            pass
        with pytest.raises(StateError):
            await VM.restore(snapshot, prefetch=False, shells=shells)
        assert held(holdings, snapshot) == before


@pytest.mark.parametrize("delay_s", [0.0, 0.0003, 0.001])
async def test_whoever_is_cancelled_while_a_shell_is_made_leaves_none(
    ready: Ready, holdings: Count, delay_s: float
) -> None:
    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        shells, vm = ShellPool(snapshot), None
        with anyio.move_on_after(delay_s):
            vm = await VM.restore(snapshot, prefetch=False, shells=shells)
        if vm is not None:  # it was as quick as that
            await vm.stop()
        await shells.aclose()
        assert held(holdings, snapshot) == before


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
        before = held(holdings, snapshot)
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
        after = held(holdings, snapshot)
        assert (after.threads, after.mappings) == (before.threads, before.mappings)
