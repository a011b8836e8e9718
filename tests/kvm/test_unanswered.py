"""A PID 1 that does not answer ``go``: no longer waited for than there is hope, and once for all VMs of a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.events.snapshot_types import RestoreStep
from asyncvmm.snapshot import handshake
from asyncvmm.snapshot.snapshot import Snapshot
from tests.kvm.conftest import PATIENCE_S

pytestmark = pytest.mark.anyio

FOREVER_S = 10_000.0

Guest = Callable[[str], Path]


async def saved(kernel: Path) -> Snapshot:
    async with VM(VMConfig(kernel=kernel, memory_mib=4, accel="kvm")) as vm:
        await vm.boot()
        return await vm.snapshot(then="stop")


async def steps_of(snapshot: Snapshot) -> list[str]:
    """The steps of one restore."""
    steps: list[str] = []

    def listen(vm: VM) -> None:
        vm.events.attach(lambda event: steps.append(event.step) if isinstance(event, RestoreStep) else None)

    with anyio.fail_after(PATIENCE_S):
        async with await VM.restore(snapshot, prepare=listen):
            return steps


async def test_one_that_may_never_answer_is_waited_for_briefly_and_its_clones_not_at_all(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "ANSWER_S", FOREVER_S)
    monkeypatch.setattr(handshake, "UNSURE_S", 0.2)
    async with await saved(guest("deaf")) as snapshot:
        assert not snapshot.guest.answers_go
        assert await steps_of(snapshot) == ["unanswered"]
        monkeypatch.setattr(handshake, "UNSURE_S", FOREVER_S)
        with anyio.fail_after(PATIENCE_S):
            async with snapshot.clones(5) as clones:
                assert [vm.state for vm in clones] == ["ready"] * 5


async def test_one_that_goes_on_without_an_answer_is_given_up(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "ANSWER_S", FOREVER_S)
    async with await saved(guest("deaf-beating")) as snapshot:
        assert snapshot.guest.answers_go
        assert await steps_of(snapshot) == ["unanswered"]
        assert snapshot.unanswering


async def test_one_that_has_answered_is_known_to(guest: Guest) -> None:
    snapshot = await saved(guest("clone-unknown"))
    async with snapshot, await VM.restore(snapshot) as vm, await vm.snapshot() as later:
        assert (snapshot.guest.answers_go, later.guest.answers_go) == (False, True)
        assert await steps_of(later) == ["entropy", "clock"]
        async with await VM.restore(later) as again, await again.snapshot() as latest:
            assert latest.guest.answers_go


async def test_of_one_that_stands_still_nothing_is_learned_for_the_others(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "ANSWER_S", 0.05)
    monkeypatch.setattr(handshake, "HEARTBEATS", 1 << 30)
    async with await saved(guest("deaf-beating")) as snapshot:
        assert await steps_of(snapshot) == ["unanswered"]
        assert not snapshot.unanswering
