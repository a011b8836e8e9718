"""Launches that are armed: made ahead for the next restore on one loop. They go with the snapshot."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

from asyncvmm import VM
from asyncvmm.machine.kvm import launch as launch_module
from asyncvmm.machine.kvm.bell import Bell
from asyncvmm.machine.kvm.launch import Launch, PreparedLaunch
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot
from tests.support.echoing import echoed
from tests.support.launched import (
    IN_SHELL,
    PATIENCE_S,
    PLAIN,
    PREFETCHED,
    Count,
    Ready,
    ready_snapshot,
)

pytestmark = pytest.mark.anyio

Bells = Callable[[], int]


@pytest.fixture
def bells(monkeypatch: pytest.MonkeyPatch) -> Bells:
    """How many there are that are open."""
    made, init = WeakSet[Bell](), Bell.__init__

    def noted(self: Bell, *arguments: Any) -> None:
        init(self, *arguments)
        made.add(self)

    monkeypatch.setattr(Bell, "__init__", noted)
    return lambda: sum(bell.fd >= 0 for bell in made)


async def test_a_snapshot_that_is_closed_has_none_armed(ready: Ready, holdings: Count, bells: Bells) -> None:
    before = holdings()
    async with ready("RE") as snapshot:
        assert armed(snapshot) == {PLAIN: 1, IN_SHELL: 1, PREFETCHED: 1}
        assert bells() == 3
    await asyncio.sleep(0)
    assert bells() == 0
    assert holdings() == before


async def test_a_restore_uses_what_is_armed_and_has_another_armed(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        first = snapshot.prepared[PLAIN]._armed[0]
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert launches == [first]
            assert await echoed(vm, b"x") == b"x"
        assert armed(snapshot)[PLAIN] == 1
        assert snapshot.prepared[PLAIN]._armed != [first]


async def test_restores_that_come_too_soon_need_none(ready: Ready, launches: list[Launch]) -> None:
    async with ready("RE") as snapshot:
        snapshot.prepared[PLAIN].disarm()
        async with await VM.restore(snapshot, prefetch=False) as vm:
            assert await echoed(vm, b"x") == b"x"
    assert len(launches) == 1


async def test_what_is_armed_for_one_loop_is_not_used_on_another(
    ready: Ready, launches: list[Launch], bells: Bells
) -> None:
    async def restored_elsewhere() -> bytes:
        async with await VM.restore(snapshot, prefetch=False) as vm:
            return await echoed(vm, b"x")

    async with ready("RE") as snapshot:
        ours = snapshot.prepared[PLAIN]._armed[0]
        assert await in_thread(lambda: asyncio.run(restored_elsewhere())) == b"x"
        assert ours not in launches
        async with await VM.restore(snapshot, prefetch=False) as vm:  # armed for a loop that has closed
            assert await echoed(vm, b"y") == b"y"
        assert len(launches) == 2
    await asyncio.sleep(0)
    assert bells() == 0


async def test_a_working_set_that_becomes_known_has_what_was_armed_before_given_up(ready: Ready, bells: Bells) -> None:
    async with ready("RE") as snapshot:
        assert not snapshot.working_set
        async with await VM.restore(snapshot) as vm:
            assert await echoed(vm, b"x") == b"x"
        assert snapshot.working_set
        assert armed(snapshot)[PREFETCHED] == 1
        assert bells() == sum(armed(snapshot).values())


async def test_what_is_prepared_twice_at_once_is_armed_once(
    guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, bells: Bells
) -> None:
    def a_while_apart(*arguments: Any, **options: Any) -> PreparedLaunch | None:
        number = next(numbers)
        if number:
            both_have_begun.set()
        both_have_begun.wait(PATIENCE_S)
        time.sleep(0.05 * number)
        return prepare_launch(*arguments, **options)

    numbers, both_have_begun, prepare_launch = count(), threading.Event(), launch_module.prepare_launch
    async with ready_snapshot(guest("foreign"), "RE") as snapshot:
        for kind in list(snapshot.prepared):
            snapshot.forget_prepared(kind)
        monkeypatch.setattr(launch_module, "prepare_launch", a_while_apart)
        vms = await asyncio.gather(*(VM.restore(snapshot, prefetch=False) for _ in range(2)))
        await asyncio.sleep(0.01)
        await asyncio.gather(*(vm.stop() for vm in vms))
        assert both_have_begun.is_set()
        assert armed(snapshot) == {PLAIN: 1}
        assert bells() == 1
    await asyncio.sleep(0)
    assert bells() == 0


async def test_what_was_retired_is_not_armed_again(ready: Ready, bells: Bells) -> None:
    async with ready("RE") as snapshot:
        prepared = snapshot.prepared[PLAIN]
        snapshot.forget_prepared(PLAIN)
        prepared.arm()
        assert not prepared._armed
        await asyncio.sleep(0)
        assert bells() == 2


def armed(snapshot: Snapshot) -> dict[LaunchKind, int]:
    return {kind: len(prepared._armed) for kind, prepared in snapshot.prepared.items()}
