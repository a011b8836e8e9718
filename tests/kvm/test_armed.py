"""Launches that are armed: made ahead for the next restore on one loop. They go with the snapshot."""

from __future__ import annotations

import asyncio
import os

import pytest

from asyncvmm import VM
from asyncvmm.machine.kvm.launch import Launch
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot
from tests.support.echoing import echoed
from tests.support.launched import (
    IN_SHELL,
    PLAIN,
    PREFETCHED,
    Count,
    Ready,
)

pytestmark = pytest.mark.anyio


async def test_a_snapshot_that_is_closed_has_none_armed(ready: Ready, holdings: Count) -> None:
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


async def test_what_is_armed_for_one_loop_is_not_used_on_another(ready: Ready, launches: list[Launch]) -> None:
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


async def test_a_working_set_that_becomes_known_has_what_was_armed_before_given_up(
    ready: Ready, launches: list[Launch]
) -> None:
    async with ready("RE") as snapshot:
        assert not snapshot.working_set
        async with await VM.restore(snapshot) as vm:
            assert await echoed(vm, b"x") == b"x"
        assert snapshot.working_set
        assert armed(snapshot)[PREFETCHED] == 1
        assert bells() == sum(armed(snapshot).values())


def armed(snapshot: Snapshot) -> dict[LaunchKind, int]:
    return {kind: len(prepared._armed) for kind, prepared in snapshot.prepared.items()}


def bells() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}").endswith("[timerfd]") for fd in list_fds())


def list_fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
