"""A machine restored in a shell that was made ahead, its vCPU held, is as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm.machine.kvm.restore_chains import ShellShape
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.machine.saved import RestorePlan
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline
from tests.support.holdings import Holdings
from tests.support.memory_guest import Files, MemoryGuest, booted, new_guest, restored

pytestmark = pytest.mark.anyio

MEMORY_MIB = 71
"""A size that no other mapping has."""
RAM = MEMORY_MIB << 20
New = Callable[[], MemoryGuest]


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    return lambda: new_guest(guest("memory"), memory_mib=MEMORY_MIB)


@pytest.fixture
async def plan(new: New, files: Files) -> RestorePlan:
    """Of a guest that has counted to 1; it has been restored once."""
    async with booted(new()) as guest:
        assert await guest.count() == 1
        await guest.machine.pause()
        plan = (await files.save(guest)).plan()
    async with restored(new(), plan, await made_ahead()):
        return plan


async def made_ahead() -> Shell:
    return await in_thread(lambda: Shell(ShellShape(memory_bytes=RAM, vcpus=1), Timeline()))


async def test_a_guest_restored_in_a_shell_goes_on_where_it_was_saved(new: New, plan: RestorePlan) -> None:
    async with restored(new(), plan, await made_ahead()) as guest:
        await guest.machine.resume()
        assert await guest.count() == 2
        await guest.machine.pause()
        await guest.machine.resume()
        assert await guest.count() == 3


async def test_a_guest_that_never_ran_since_it_was_restored_can_be_saved(
    new: New, files: Files, plan: RestorePlan
) -> None:
    async with restored(new(), plan, await made_ahead()) as guest:
        again = await files.save(guest)
        await guest.machine.resume()
        assert await guest.count() == 2
    async with restored(new(), again.plan()) as guest:
        await guest.machine.resume()
        assert await guest.count() == 2


async def test_a_guest_that_is_stopped_before_it_is_resumed_leaves_nothing(
    new: New, plan: RestorePlan, holdings: Callable[..., Holdings]
) -> None:
    before = holdings(RAM)
    async with restored(new(), plan, await made_ahead()):
        assert holdings(RAM) != before
    assert holdings(RAM) == before


async def test_a_restore_that_was_cancelled_before_it_began_leaves_nothing(
    new: New, plan: RestorePlan, holdings: Callable[..., Holdings]
) -> None:
    before, shell, guest = holdings(RAM), await made_ahead(), new()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await guest.machine.restore(plan, shell=shell)
    assert scope.cancelled_caught
    await guest.machine.stop()
    assert holdings(RAM) == before
