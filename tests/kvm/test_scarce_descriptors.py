"""A process that may open few more files: boots and restores that fail say so in kind, and leave nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.errors import ConfigError, HostError, SnapshotError
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.scarcity import booted, descriptors_left, echoing_config, errors_until_it_can_be, out_of_kind

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["bare", "with devices"])
def config(request: pytest.FixtureRequest, guest: Callable[[str], Path], tmp_path: Path) -> VMConfig:
    """A guest that echoes, with devices or without."""
    return echoing_config(guest("foreign"), disk=tmp_path / "disk" if request.param else None)


@pytest.fixture
async def saved(config: VMConfig, tmp_path: Path) -> Path:
    """A snapshot of such a guest."""
    async with VM(config) as vm:
        await vm.boot()
        return (await vm.snapshot(out=tmp_path / "saved", then="stop")).path


@asynccontextmanager
async def few(count: int) -> AsyncIterator[None]:
    with descriptors_left(count):
        yield


async def test_boots_fail_in_kind(config: VMConfig) -> None:
    errors = await errors_until_it_can_be(lambda: booted(config), few)
    assert not out_of_kind(errors, HostError, ConfigError)


async def test_restores_fail_in_kind(saved: Path) -> None:
    errors = await errors_until_it_can_be(lambda: VM.restore(saved), few)
    assert not out_of_kind(errors, HostError, SnapshotError)


async def test_restores_of_an_open_snapshot_fail_in_kind(saved: Path) -> None:
    async with await Snapshot.load(saved) as snapshot:
        errors = await errors_until_it_can_be(lambda: VM.restore(snapshot, prefetch=False), few)
    assert not out_of_kind(errors, HostError, SnapshotError)
