"""A process that may start few more threads: what fails says so in kind, leaves nothing behind, and harms no VM."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VM, DriveConfig, VMConfig
from asyncvmm.errors import HostError
from asyncvmm.machine.kvm.calibrate import measure
from asyncvmm.snapshot.shell_pool import ShellPool
from tests.support.echoing import echoed
from tests.support.holdings import Holdings
from tests.support.scarcity import busy_workers, nothing_more_is_held_than, threads_left

pytestmark = [pytest.mark.anyio, pytest.mark.stalls]  # what must be freed is, by the loop where no thread is to be had

MEMORY_MIB = 71


@pytest.fixture(params=[False, True], ids=["bare", "with devices"])
def config(request: pytest.FixtureRequest, guest: Callable[[str], Path], tmp_path: Path) -> VMConfig:
    """A guest that echoes, with devices and a second vCPU, or without."""
    config = VMConfig(kernel=guest("foreign"), cmdline="RE", memory_mib=MEMORY_MIB, accel="kvm")
    if not request.param:
        return config
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    return attrs.evolve(config, vcpus=2, drives=[DriveConfig(path=disk, overlay=True)], vsock=True)


@pytest.fixture
async def vm(config: VMConfig) -> AsyncIterator[VM]:
    async with VM(config) as vm:
        await vm.boot()
        yield vm


def held() -> Holdings:
    return Holdings.now(MEMORY_MIB << 20)


async def errors_until_it_can_be(make: Callable[[], Awaitable[VM]]) -> list[Exception]:
    """What comes with no thread to be had, with one, and so on until there are enough."""
    errors: list[Exception] = []
    while True:
        async with await make():  # what is kept for a coming one is there again
            await anyio.sleep(0.02)
        gc.collect()
        before = held()
        async with busy_workers():
            try:
                with threads_left(len(errors)):
                    vm = await make()
            except Exception as error:
                errors.append(error.with_traceback(None))
                await nothing_more_is_held_than(before, held)
            else:
                await vm.stop()
                return errors


def in_kind(errors: list[Exception]) -> bool:
    return bool(errors) and all(isinstance(error, HostError) and "thread" in str(error) for error in errors)


async def test_boots_fail_in_kind(config: VMConfig) -> None:
    async def boot() -> VM:
        vm = VM(config)
        await vm.boot()
        return vm

    assert in_kind(await errors_until_it_can_be(boot))


async def test_restores_fail_in_kind(vm: VM, tmp_path: Path) -> None:
    saved = (await vm.snapshot(out=tmp_path / "saved", then="stop")).path
    assert in_kind(await errors_until_it_can_be(lambda: VM.restore(saved)))


async def test_a_vm_that_cannot_be_paused_or_saved_goes_on(vm: VM, tmp_path: Path) -> None:
    async with busy_workers():
        with threads_left(0):
            with pytest.raises(HostError, match="thread"):
                await vm.pause()
            with pytest.raises(HostError, match="thread"):
                await vm.snapshot(out=tmp_path / "saved")
            assert await echoed(vm, b"abc") == b"abc"
    assert not (tmp_path / "saved").exists()
    await vm.pause()
    await vm.resume()
    assert await echoed(vm, b"def") == b"def"


async def test_a_vm_is_freed_all_the_same(config: VMConfig) -> None:
    before = held()
    vm = VM(config)
    await vm.boot()
    async with busy_workers():
        with threads_left(0):
            await vm.stop()
        await nothing_more_is_held_than(before, held)


async def test_shells_are_freed_all_the_same(vm: VM) -> None:
    async with await vm.snapshot() as snapshot:
        before, shells, others = held(), ShellPool(snapshot), ShellPool(snapshot)
        await shells.fill()
        async with busy_workers():
            with threads_left(0):
                with pytest.raises(HostError, match="thread"):
                    await others.fill()
                await others.aclose()
                await shells.aclose()
            await nothing_more_is_held_than(before, held)


def test_a_host_that_cannot_be_measured_says_why() -> None:
    with threads_left(0), pytest.raises(HostError, match="thread"):
        measure()
    assert measure().ring0_mips > 0


async def test_a_snapshot_is_closed_and_gone_all_the_same(vm: VM) -> None:
    snapshot = await vm.snapshot()
    directory = snapshot.path.parent
    async with busy_workers():
        with threads_left(0):
            await snapshot.aclose()
    assert snapshot.closed
    assert not directory.exists()
