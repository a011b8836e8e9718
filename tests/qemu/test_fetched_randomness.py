"""What Linux has fetched of its entropy device before it is saved, no clone gives to its workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.snapshot import Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "image")]

PATIENCE_S = 120
BYTES = 256
"""More than Linux holds: a cache line of its hw_random core, and one of the device's driver."""
WORKLOAD = ("sh", "-c", f"head -c {BYTES} /dev/hwrng | od -An -v -tx1 | tr -d ' \\n'; echo")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """What the guest has is no loop's affair: one will do."""
    return "asyncio", {"use_uvloop": True}


async def saved(out: Path) -> Snapshot:
    """One step before its workload runs."""
    when = SnapshotResources(on_pre_exec=True, quiesce_ms=100, out_path=out)
    taken: list[Snapshot] = []
    async with VM(VMConfig(accel="qemu", rng=True, workload=WORKLOAD)) as vm:

        async def take() -> None:
            taken.append(await vm.snapshot(when, then="stop"))

        async with anyio.create_task_group() as group:
            group.start_soon(take)
            await anyio.lowlevel.checkpoint()
            await vm.boot()
    return taken[0]


async def random_of(snapshot: Snapshot) -> bytes:
    """What a clone's workload reads."""
    readers: list[ConsoleReader] = []
    async with await VM.restore(snapshot, prepare=lambda vm: readers.append(vm.console.subscribe())) as vm:
        assert await vm.events.exit == 0
        return bytes.fromhex(readers[0].take().decode())


async def test_the_first_random_bytes_of_clones_differ(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE_S):
        async with await saved(tmp_path / "s") as snapshot:
            one, other = [await random_of(snapshot) for _ in range(2)]
    assert len(one) == len(other) == BYTES
    for start in range(0, BYTES, 16):
        assert one[start : start + 16] != other[start : start + 16]
