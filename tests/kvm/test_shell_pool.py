"""A pool of shells that fails, or is cancelled, on the way in or out keeps none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.errors import MemorySizeError
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.kvm.ring_shape import PAYS_FROM_BYTES, enters_guests, largest, ring_shape
from asyncvmm.snapshot.shell_pool import ShellPool
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.cancelling import cancel_work
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

MEMORY_MIB = 73
"""A size that no other mapping has."""
SIZE = 3

Count = Callable[..., Holdings]


@pytest.fixture
async def snapshot(guest: Callable[[str], Path], temporary_directory: Path) -> AsyncIterator[Snapshot]:
    async with saved(guest("foreign"), MEMORY_MIB) as snapshot:
        yield snapshot


@pytest.fixture
async def large(guest: Callable[[str], Path], temporary_directory: Path) -> AsyncIterator[Snapshot]:
    async with saved(guest("foreign"), PAYS_FROM_BYTES >> 20) as snapshot:
        yield snapshot


@asynccontextmanager
async def saved(kernel: Path, memory_mib: int) -> AsyncIterator[Snapshot]:
    config = VMConfig(kernel=kernel, cmdline="RH", memory_mib=memory_mib, accel="kvm")
    async with VM(config) as original:
        await original.boot()
        made = await original.snapshot(then="stop")
    async with made:
        yield made


def held(count: Count) -> Holdings:
    return count(MEMORY_MIB << 20)


async def test_a_pool_that_can_be_filled_in_part_only_leaves_no_shell(
    snapshot: Snapshot, holdings: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = ShellPool._make, list[Shell]()

    def make_two(self: ShellPool) -> Shell:
        if len(made) == 2:
            raise MemorySizeError("guest memory", expected="a mapping of it", found="no more")
        made.append(make(self))
        return made[-1]

    monkeypatch.setattr(ShellPool, "_make", make_two)
    before = held(holdings)
    with pytest.raises(MemorySizeError):
        async with ShellPool(snapshot, SIZE):
            pass
    assert len(made) == 2
    assert held(holdings) == before


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.002])
async def test_whoever_is_cancelled_while_a_pool_is_filled_leaves_no_shell(
    snapshot: Snapshot, holdings: Count, delay_s: float
) -> None:
    before = held(holdings)
    entering = asyncio.ensure_future(ShellPool(snapshot, SIZE).__aenter__())
    await asyncio.sleep(delay_s)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert held(holdings) == before


async def test_whoever_is_cancelled_while_a_pool_is_closed_leaves_no_shell(snapshot: Snapshot, holdings: Count) -> None:
    before = held(holdings)
    pool = ShellPool(snapshot, SIZE)
    await pool.fill()
    await cancel_work(1, pool.aclose())
    assert held(holdings) == before


async def test_whether_rings_pay_is_asked_beside_the_loop(large: Snapshot) -> None:
    enters_guests.cache_clear()
    largest.cache_clear()
    pool = ShellPool(large, track_dirty=True)
    assert enters_guests.cache_info().misses == largest.cache_info().misses == 0
    async with pool:
        assert enters_guests.cache_info().misses == 1
        assert pool._shells[0].shape.ring == ring_shape(PAYS_FROM_BYTES)
        async with await VM.restore(large, shells=pool, track_dirty=True) as restored:
            assert restored.state == "ready"
