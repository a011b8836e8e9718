"""The VM generation ID: every restored guest whose driver heeds it gets one of its own, and hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.snapshot.snapshot import Snapshot
from tests.kvm.conftest import PATIENCE_S

pytestmark = pytest.mark.anyio

UNSET, NEW_GENERATION, NOTHING = bytes(16), 2, 0


@pytest.fixture
def vm(guest: Callable[[str], Path]) -> VM:
    return VM(VMConfig(kernel=guest("generation"), memory_mib=4, accel="kvm"))


async def answer(vm: VM, question: bytes, size: int) -> bytes:
    """What the guest says to it."""
    reader, said = vm.console.subscribe(), b""
    await vm.console.write(question)
    with anyio.fail_after(PATIENCE_S):
        while len(said) < size:
            said += await anext(reader)
    await reader.aclose()
    return said


async def generation(vm: VM) -> tuple[bytes, int]:
    """The guest's ID, and the event that it was told of."""
    said = await answer(vm, b"?", 18)
    assert said[17:] == b"!"
    return said[:16], said[16]


async def restored_generation(snapshot: Snapshot) -> tuple[bytes, int]:
    async with await VM.restore(snapshot) as clone:
        return await generation(clone)


async def test_each_clone_of_a_guest_that_heeds_it_gets_one_of_its_own_and_is_told_once(vm: VM) -> None:
    async with vm:
        await vm.boot()
        assert await generation(vm) == (UNSET, NOTHING)
        assert await answer(vm, b"h", 1) == b"h"
        snapshot = await vm.snapshot()
        assert await generation(vm) == (UNSET, NOTHING)
        async with await VM.restore(snapshot) as clone:
            first = await generation(clone)
            assert await generation(clone) == (first[0], NOTHING)
            of_clone = await restored_generation(await clone.snapshot())
        others = [first, await restored_generation(snapshot), of_clone]
    assert [event for _, event in others] == [NEW_GENERATION] * 3
    assert len({UNSET, *(id for id, _ in others)}) == 4


async def test_nothing_is_written_into_a_guest_that_does_not_heed_it(vm: VM) -> None:
    async with vm:
        await vm.boot()
        snapshot = await vm.snapshot()
        assert await restored_generation(snapshot) == (UNSET, NOTHING)
