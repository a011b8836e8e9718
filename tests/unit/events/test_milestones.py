from __future__ import annotations

import asyncio
import gc
import traceback

import anyio
import pytest

from asyncvmm.errors import AsyncVMMError, BootError, ConfigError, GuestStopped, KvmIoctlError
from asyncvmm.events.milestones import Milestone, fresh

pytestmark = pytest.mark.anyio


async def test_it_can_be_awaited_before_and_after_and_many_times() -> None:
    milestone: Milestone[int] = Milestone("ready")
    results: list[int] = []

    async def wait() -> None:
        results.append(await milestone)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert results == []
        assert milestone.set(7)
    assert results == [7, 7, 7]
    assert await milestone == 7
    assert await asyncio.wait_for(milestone, 1) == 7
    assert list(await asyncio.gather(milestone, milestone.wait())) == [7, 7]


async def test_the_first_outcome_counts() -> None:
    milestone: Milestone[int] = Milestone("ready")
    assert milestone.set(1)
    assert not milestone.set(2)
    assert not milestone.fail(GuestStopped("too late", reason="shutdown"))
    assert await milestone == 1


async def test_none_is_a_value() -> None:
    milestone: Milestone[None] = Milestone("ready")
    assert not milestone.done
    milestone.set(None)
    assert milestone.done
    assert await milestone is None


async def test_each_caller_gets_an_error_of_its_own_with_the_same_facts() -> None:
    milestone: Milestone[int] = Milestone("ready")
    milestone.fail(BootError("no root", reason="panic", rip=5, serial_tail=b"VFS"))
    caught = []
    for _ in range(2):
        with pytest.raises(BootError) as info:
            await milestone
        caught.append(info.value)
    assert caught[0] is not caught[1]
    for error in caught:
        assert (error.reason, error.rip, error.serial_tail, str(error)) == ("panic", 5, b"VFS", "no root")
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in caught]
    assert lengths[0] == lengths[1]
    assert milestone.error is not None
    assert milestone.error.__traceback__ is None


@pytest.mark.parametrize("error", [ConfigError("x", expected=1), KvmIoctlError("KVM_RUN", 14, "Bad address")])
async def test_errors_of_every_shape_can_be_copied(error: AsyncVMMError) -> None:
    error.__cause__ = OSError(14, "Bad address")
    copy = fresh(error)
    assert type(copy) is type(error)
    assert (str(copy), copy.__dict__, copy.__cause__) == (str(error), error.__dict__, error.__cause__)


async def test_cancelling_one_waiter_leaves_the_others() -> None:
    milestone: Milestone[int] = Milestone("ready")
    first, second = asyncio.create_task(milestone.wait()), asyncio.create_task(milestone.wait())
    await anyio.wait_all_tasks_blocked()
    first.cancel()
    await asyncio.wait([first])
    milestone.set(3)
    assert await second == 3
    assert first.cancelled()


async def test_a_failure_that_nobody_awaits_makes_no_noise() -> None:
    noises: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noises.append(context))
    milestone: Milestone[int] = Milestone("ready")
    milestone.fail(GuestStopped("gone", reason="shutdown"))
    del milestone
    gc.collect()
    await asyncio.sleep(0)
    assert noises == []


def test_a_milestone_made_without_a_loop_is_reached_in_one() -> None:
    milestone: Milestone[str] = Milestone("x")

    async def reach() -> str:
        task = asyncio.create_task(milestone.wait())
        await asyncio.sleep(0)
        milestone.set("inside")
        return await task

    assert "pending" in repr(milestone)
    assert asyncio.run(reach()) == "inside"


def test_a_milestone_made_and_set_without_a_loop_is_awaited_in_one() -> None:
    milestone: Milestone[str] = Milestone("x")
    milestone.set("before")
    assert asyncio.run(milestone.wait()) == "before"
