"""What is under way at a VM is ended, and waited for, by its end."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.activities import Activities
from asyncvmm.errors import StateError

pytestmark = pytest.mark.anyio


async def test_what_is_ended_raises_once_it_has_cleared_up() -> None:
    activities = Activities()
    steps: list[str] = []

    async def forever() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            steps.append("cleared up")

    async def work() -> None:
        with pytest.raises(StateError), activities.begin("boot"):
            await forever()

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        group.start_soon(work)
        await anyio.sleep(0.01)
        await activities.end_all()
        assert steps == ["cleared up", "cleared up"]


async def test_whoever_ends_them_and_is_cancelled_hears_of_it_when_all_have_ended() -> None:
    activities, steps = Activities(), list[str]()

    async def forever() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.02)
            steps.append("cleared up")

    async def work() -> None:
        with pytest.raises(StateError), activities.begin("boot"):
            await forever()

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await anyio.sleep(0.01)
        ending = asyncio.ensure_future(activities.end_all())
        await anyio.lowlevel.checkpoint()
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert steps == ["cleared up"]


async def test_an_error_of_its_own_stays_what_it_is() -> None:
    activities = Activities()
    with pytest.raises(ValueError, match="mine"), activities.begin("boot"):
        raise ValueError("mine")
    await activities.end_all()


async def test_a_caller_who_is_cancelled_is_cancelled() -> None:
    activities = Activities()
    with anyio.move_on_after(0.01) as scope, activities.begin("boot"):
        await anyio.sleep_forever()
    assert scope.cancelled_caught
