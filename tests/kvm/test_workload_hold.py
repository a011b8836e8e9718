"""The window before the workload's exec: held for the calls that want to save the guest there, and let go after them.

The guest is tests/guests/kvm/clone.S with HELD: it holds its workload until the first ``go``, prints that one's seed,
and says that the workload has ended.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.errors import SnapshotFailed, StateError, TriggerImpossible
from asyncvmm.events.types import Event, VmState
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.snapshot.predicate import Predicate
from asyncvmm.snapshot.predicates import after, console, pre_exec
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.snapshot import Snapshot
from tests.kvm.conftest import IN_LAB, PATIENCE_S
from tests.support.cancelling import cancel_work

pytestmark = pytest.mark.anyio

IN_WINDOW = SnapshotResources(on_pre_exec=True)
LATER = SnapshotResources(on_pre_exec=True, quiesce_ms=1000)
"""Late enough for what is to be done before, on however busy a machine."""
Make = Callable[..., VM]


@pytest.fixture
def held(guest: Callable[[str], Path], tmp_path: Path) -> Make:
    """Makes a VM whose guest holds its workload."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(512))

    def make(**options: Any) -> VM:
        kernel = guest("clone-held")
        config = VMConfig(
            kernel=kernel, initrd=initrd, cmdline="", workload=("true",), memory_mib=4, accel="kvm", **options
        )
        return VM(config)

    return make


async def armed(vm: VM, when: SnapshotResources | Predicate = IN_WINDOW, **options: Any) -> asyncio.Task[Snapshot]:
    """A call for a snapshot that was begun before the boot."""
    task = asyncio.create_task(vm.snapshot(when, **options))
    await anyio.lowlevel.checkpoint()
    return task


async def ran(vm: VM) -> bool:
    """The workload was let go, and is done."""
    with anyio.fail_after(PATIENCE_S):
        return await vm.events.exit == 0


@pytest.mark.parametrize(
    "when", [SnapshotResources(on_pre_exec=True, after_ms=0), pre_exec() | after(0)], ids=["policy", "predicate"]
)
async def test_it_is_let_go_whatever_came_first(held: Make, when: SnapshotResources | Predicate) -> None:
    async with held() as vm:
        call = await armed(vm, when)
        await vm.boot()
        (await call).close()
        assert await ran(vm)


async def test_it_is_let_go_though_nothing_could_be_saved(held: Make, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    async with held() as vm:
        call = await armed(vm, LATER, out=tmp_path / "gone" / "s")
        await vm.boot()
        shutil.rmtree(tmp_path / "gone")
        with pytest.raises(SnapshotFailed):
            await call
        assert await ran(vm)


@pytest.mark.parametrize("state", ["booting", "ready"])
async def test_it_is_let_go_though_the_call_is_cancelled(held: Make, state: str) -> None:
    def cancel(event: Event) -> None:
        if isinstance(event, VmState) and event.state == state:
            call.cancel()

    async with held() as vm:
        call = await armed(vm, LATER)
        vm.events.attach(cancel)
        await vm.boot()
        assert await ran(vm)
        assert call.cancelled()


async def test_it_is_let_go_though_the_call_is_cancelled_when_all_is_saved(held: Make) -> None:
    async with held() as vm:
        call = await armed(vm)
        vm.events.attach(lambda event: None if event.event != "snapshot.saved" else _cancel_soon(call))
        await vm.boot()
        await asyncio.wait([call])
        if not call.cancelled():
            call.result().close()
        assert await ran(vm)


def _cancel_soon(task: asyncio.Task[Any]) -> None:
    task.cancel()
    asyncio.get_running_loop().call_soon(task.cancel)


async def test_that_of_a_paused_vm_is_let_go_when_it_goes_on_though_that_is_cancelled(held: Make) -> None:
    async with held() as vm:
        call = await armed(vm, LATER)
        await vm.boot()
        await vm.events.pre_exec
        await vm.pause()
        async with await call as snapshot:
            assert snapshot.guest.in_window
        assert vm.state == "paused"
        await cancel_work(1, vm.resume())
        assert await ran(vm)
        assert str(vm.state) == "ready"


async def test_it_is_held_until_the_last_call_that_wants_it_ends(held: Make) -> None:
    async with held() as vm:
        slow = await armed(vm, SnapshotResources(on_pre_exec=True, quiesce_ms=5000 if IN_LAB else 2000))
        quick = await armed(vm)
        await vm.boot()
        async with await quick, await slow as last:
            assert last.guest.in_window
        assert await ran(vm)


async def test_it_is_held_for_nobody_who_gave_up_before_the_boot(held: Make) -> None:
    async with held() as vm:
        call = await armed(vm)
        assert vm.config.pre_exec_window
        call.cancel()
        await asyncio.wait([call])
        assert not vm.config.pre_exec_window


async def test_one_that_is_about_to_run_and_that_nobody_holds_is_not_saved_there(held: Make) -> None:
    async with held() as vm:
        await vm.boot()
        for when in (IN_WINDOW, pre_exec()):
            with pytest.raises(TriggerImpossible, match="ask before boot"):
                await vm.snapshot(when)


async def test_a_configured_window_stays_for_snapshots_that_do_not_want_it(held: Make) -> None:
    async with held(pre_exec_window=True) as vm:
        await vm.boot()
        await vm.events.pre_exec
        async with await vm.snapshot() as snapshot:
            assert snapshot.guest.in_window
        async with await vm.snapshot(IN_WINDOW) as snapshot:
            assert snapshot.guest.in_window
        assert await ran(vm)


async def test_clones_of_a_vm_that_never_ran_differ(held: Make) -> None:
    async with held() as vm:
        call = await armed(vm, then="stop")
        await vm.boot()
        first = await call
    async with first, await VM.restore(first, paused=True) as paused:
        async with await paused.snapshot() as second:
            assert second.guest.in_window
            seeds = {await seed(second) for _ in range(3)}
        assert len(seeds) == 3
        reader = paused.console.subscribe()
        await paused.resume()
        assert await ran(paused)
        assert reader.take() not in seeds


async def seed(snapshot: Snapshot) -> bytes:
    """What the workload of a restored VM found."""
    readers: list[Any] = []
    async with await VM.restore(snapshot, prepare=lambda vm: readers.append(vm.console.subscribe())) as vm:
        assert await ran(vm)
        text: bytes = readers[0].take()
        assert text.count(b"\n") == 1
        return text


async def test_a_machine_that_says_ready_before_its_start_returns_is_saved(
    held: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(machine: KvmMachine) -> None:
        await begin(machine)
        await anyio.sleep(0.02)

    begin = KvmMachine.start
    monkeypatch.setattr(KvmMachine, "start", start)
    async with held() as vm:
        call = await armed(vm)
        await vm.boot()
        (await call).close()
        assert await ran(vm)


async def test_a_stop_that_is_cancelled_while_a_call_ends_frees_all_the_same(held: Make) -> None:
    async with held() as vm:
        await vm.boot()
        call = asyncio.create_task(vm.snapshot(console(rb"never")))
        await anyio.sleep(0.02)
        await cancel_work(1, vm.stop())
        assert vm.state == "stopped"
        with pytest.raises(StateError, match="stop"):
            await call
