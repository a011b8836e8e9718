"""A process that may open few more files: boots and restores that fail say so in kind, and leave nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VM, DriveConfig, VMConfig
from asyncvmm.errors import ConfigError, HostError, SnapshotError
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.holdings import Holdings
from tests.support.scarcity import descriptors_left, nothing_more_is_held_than

pytestmark = pytest.mark.anyio

MEMORY_MIB = 68


@pytest.fixture(params=[False, True], ids=["bare", "with devices"])
def config(request: pytest.FixtureRequest, guest: Callable[[str], Path], tmp_path: Path) -> VMConfig:
    """A guest that echoes, with devices or without."""
    config = VMConfig(kernel=guest("foreign"), cmdline="RE", memory_mib=MEMORY_MIB, accel="kvm")
    if not request.param:
        return config
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    return attrs.evolve(config, drives=[DriveConfig(path=disk, overlay=True)], vsock=True)


@pytest.fixture
async def saved(config: VMConfig, tmp_path: Path) -> Path:
    """A snapshot of such a guest."""
    async with VM(config) as vm:
        await vm.boot()
        return (await vm.snapshot(out=tmp_path / "saved", then="stop")).path


async def errors_until_it_can_be(make: Callable[[], Awaitable[VM]]) -> list[Exception]:
    """What comes with no descriptor to be had, with one, and so on until there are enough."""
    errors: list[Exception] = []
    while True:
        async with await make():  # what is kept for a coming one is there again
            await anyio.sleep(0.02)
        gc.collect()
        before = Holdings.now(MEMORY_MIB << 20)
        try:
            with descriptors_left(len(errors)):
                vm = await make()
        except Exception as error:
            errors.append(error.with_traceback(None))
            await nothing_more_is_held_than(before, lambda: Holdings.now(MEMORY_MIB << 20))
        else:
            await vm.stop()
            return errors


async def test_boots_fail_in_kind(config: VMConfig) -> None:
    async def boot() -> VM:
        vm = VM(config)
        await vm.boot()
        return vm

    errors = await errors_until_it_can_be(boot)
    assert errors
    assert not [error for error in errors if not isinstance(error, HostError | ConfigError)]


async def test_restores_fail_in_kind(saved: Path) -> None:
    errors = await errors_until_it_can_be(lambda: VM.restore(saved))
    assert errors
    assert not [error for error in errors if not isinstance(error, HostError | SnapshotError)]


async def test_restores_of_an_open_snapshot_fail_in_kind(saved: Path) -> None:
    async with await Snapshot.load(saved) as snapshot:
        errors = await errors_until_it_can_be(lambda: VM.restore(snapshot, prefetch=False))
    assert errors
    assert not [error for error in errors if not isinstance(error, HostError | SnapshotError)]
