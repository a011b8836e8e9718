"""A process that may start few more threads: what fails says so in kind, leaves nothing behind, and harms no VM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.errors import HostError
from asyncvmm.machine.kvm.calibrate import measure
from asyncvmm.snapshot.shell_pool import ShellPool
from tests.support.echoing import echoed
from tests.support.scarcity import (
    booted,
    echoing_config,
    errors_until_it_can_be,
    held,
    nothing_more_is_held_than,
    out_of_kind,
    threads_left,
    workers_left,
)

pytestmark = [pytest.mark.anyio, pytest.mark.stalls]  # what must be freed is, by the loop where no thread is to be had


@pytest.fixture(params=[False, True], ids=["bare", "with devices"])
def config(request: pytest.FixtureRequest, guest: Callable[[str], Path], tmp_path: Path) -> VMConfig:
    """A guest that echoes, with devices and a second vCPU, or without."""
    if request.param:
        return attrs.evolve(echoing_config(guest("foreign"), disk=tmp_path / "disk"), vcpus=2)
    return echoing_config(guest("foreign"), disk=None)


@pytest.fixture
async def vm(config: VMConfig) -> AsyncIterator[VM]:
    async with VM(config) as vm:
        await vm.boot()
        yield vm


async def test_boots_fail_in_kind(config: VMConfig) -> None:
    errors = await errors_until_it_can_be(lambda: booted(config), workers_left)
    assert not out_of_kind(errors, HostError, saying="thread")


async def test_restores_fail_in_kind(vm: VM, tmp_path: Path) -> None:
    saved = (await vm.snapshot(out=tmp_path / "saved", then="stop")).path
    errors = await errors_until_it_can_be(lambda: VM.restore(saved), workers_left)
    assert not out_of_kind(errors, HostError, saying="thread")


async def test_a_vm_that_cannot_be_paused_or_saved_goes_on(vm: VM, tmp_path: Path) -> None:
    async with workers_left(0):
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
    vm = await booted(config)
    async with workers_left(0):
        await vm.stop()
    await nothing_more_is_held_than(before)


async def test_shells_are_freed_all_the_same(vm: VM) -> None:
    async with await vm.snapshot() as snapshot:
        before, shells, others = held(), ShellPool(snapshot), ShellPool(snapshot)
        await shells.fill()
        async with workers_left(0):
            with pytest.raises(HostError, match="thread"):
                await others.fill()
            await others.aclose()
            await shells.aclose()
        await nothing_more_is_held_than(before)


def test_a_host_that_cannot_be_measured_says_why() -> None:
    with threads_left(0), pytest.raises(HostError, match="thread"):
        measure()
    assert measure().ring0_mips > 0


async def test_a_snapshot_is_closed_and_gone_all_the_same(vm: VM) -> None:
    snapshot = await vm.snapshot()
    directory = snapshot.path.parent
    async with workers_left(0):
        await snapshot.aclose()
    assert snapshot.closed
    assert not directory.exists()
