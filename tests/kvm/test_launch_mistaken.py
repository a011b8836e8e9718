"""Launches that are broken off or fail at the wrong moment: none is taken for another, and none leaves anything."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import pytest

from asyncvmm import VM
from asyncvmm.errors import KvmIoctlError, SnapshotMismatch
from asyncvmm.machine.kvm import ahead, runner
from asyncvmm.machine.kvm.fastpath.chain import executor
from asyncvmm.machine.kvm.launch import Launch
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.shell_pool import ShellPool
from tests.support.launched import PATIENCE_S, PLAIN, Count, Ready, await_a_runner, faulty, held

pytestmark = pytest.mark.anyio

NO_ADDRESS = 8


class Signalled(BaseException):
    """What a signal's handler raises."""


@pytest.mark.stalls  # the loop is kept busy on purpose
async def test_a_launch_that_failed_is_not_taken_for_the_next_one_of_its_runner(ready: Ready) -> None:
    async with ready("RE") as snapshot:
        good = snapshot.prepared[PLAIN]
        good.disarm()
        faulty(snapshot, PLAIN, given=(NO_ADDRESS, *good.chain.given[1:]))
        bad, fine = snapshot.prepared[PLAIN]._made(), good._made()
        assert bad is not None
        assert fine is not None
        only = await in_thread(the_only_runner)
        bad.send(only, None, True)
        assert sent_again(only, fine)  # the loop has not been told of the failure yet
        bad._look()
        with pytest.raises((KvmIoctlError, SnapshotMismatch)):
            await bad.mapped()
        for launch in (bad, fine):
            await launch.aclose()
        good.retire()


def the_only_runner() -> runner.Runner:
    await_a_runner()
    found = runner.take()
    assert found is not None
    while runner.take() is not None:
        pass
    return found


def sent_again(only: runner.Runner, launch: Launch) -> bool:
    """Whether that runner has made this launch's chain, after another one's."""
    end = time.monotonic() + PATIENCE_S
    while (idle := runner.take()) is None and time.monotonic() < end:
        time.sleep(0.0005)
    assert idle is only
    launch.send(idle, None, True)
    while not idle.has_made(launch._order.count) and time.monotonic() < end:
        time.sleep(0.0005)
    return idle.has_made(launch._order.count)


async def test_a_signal_while_steps_are_made_ahead_leaves_nothing_of_them(
    ready: Ready, holdings: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off() -> Callable[..., int]:
        def make(*arguments: Any) -> int:
            executor()(*arguments)
            raise Signalled

        return make

    async with ready("RE") as snapshot:
        before = held(holdings, snapshot)
        with monkeypatch.context() as patched:
            patched.setattr(ahead, "executor", broken_off)
            with pytest.raises(Signalled):
                snapshot.prepared[PLAIN].arm()
        gc.collect()
        await asyncio.sleep(0.01)
        assert held(holdings, snapshot) == before


@pytest.mark.parametrize("in_shell", [False, True])
async def test_a_signal_just_before_a_launch_is_sent_loses_neither_runner_nor_shell(
    ready: Ready, holdings: Count, in_shell: bool
) -> None:
    async with ready("RE") as snapshot:
        before, idle = held(holdings, snapshot), len(runner._idle)
        async with ShellPool(snapshot) as pool:
            await pool.fill()
            with raising_in(Launch.send.__code__), pytest.raises(Signalled):
                await VM.restore(snapshot, prefetch=False, shells=pool if in_shell else None)
            assert len(runner._idle) == idle
        gc.collect()
        await asyncio.sleep(0.01)
        assert held(holdings, snapshot) == before


@contextmanager
def raising_in(code: CodeType) -> Iterator[None]:
    """Raise as that function is entered, which is where the interpreter looks for signals."""

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is code:
            raise Signalled

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
