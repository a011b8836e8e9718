"""Linux with devices at work, saved and restored on KVM: its files, its entropy, its ports and its balloon go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.guest_agent import PORT, SCRIPT, Agent
from tests.support.guest_root import guest_root

# Stalls: one emulated CPU may wait long for a busy host's while the other, which would be the excuse, does not.
pytestmark = [pytest.mark.anyio, pytest.mark.stalls, pytest.mark.requires("e2fsprogs")]

PATIENCE_S = 600
"""Several guests at a time, on an emulated host."""

LINES = 60
WRITE = f"(exec 3>&-; for i in $(seq {LINES}); do echo $i >>/log; sync; done; touch /done) >/dev/null 2>&1 &"
"""A writer in the background: each line is a few requests to the disk."""

MOMENTS = 2


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The boot is shared, so is the loop."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VM]:
    root = guest_root(tmp_path_factory.mktemp("snapshots"))
    config = VMConfig(
        accel="kvm",
        memory_mib=128,
        drives=[DriveConfig(path=root, root=True, id="root", overlay=True)],
        balloon=BalloonConfig(free_page_reporting=False),
        rng=True,
        vsock=True,
        virtio_console=ConsoleConfig(ports=(PORT,)),
        workload=("sh", "-c", SCRIPT),
    )
    async with VM(config) as vm:
        with anyio.fail_after(PATIENCE_S):
            await vm.boot()
        yield vm


async def written(agent: Agent) -> None:
    """Wait for the writer's end; then see that it wrote every line, once, and that the disk itself has them."""
    said = ""
    with anyio.move_on_after(PATIENCE_S):
        while not said.startswith("/done"):
            await anyio.sleep(0.2)
            said = await agent.run("ls /done 2>/dev/null; wc -l </log")
    assert said == f"/done\n{LINES}\n"
    expected = "".join(f"{number}\n" for number in range(1, LINES + 1))
    assert await agent.run("cat /log") == expected
    await agent.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert await agent.run("cat /log") == expected


async def test_a_guest_that_writes_goes_on_in_each_of_its_copies(vm: VM, tmp_path: Path) -> None:
    agent = Agent(vm.ports[PORT])
    await agent.run(WRITE)
    snapshots: list[Snapshot] = []
    for moment in range(MOMENTS):
        await anyio.sleep(0.3)
        snapshots.append(await vm.snapshot(out=tmp_path / f"s{moment}"))
    for snapshot in snapshots:
        async with snapshot, await VM.restore(snapshot) as copy:
            other = Agent(copy.ports[PORT])
            before = int(await other.run("wc -l </log"))
            assert before <= LINES
            await written(other)
    await written(agent)


async def test_devices_of_a_copy_work(vm: VM) -> None:
    ask = "head -c 16 /dev/hwrng | sha256sum"
    agent = Agent(vm.ports[PORT])
    before = await agent.run(ask)
    async with await vm.snapshot() as snapshot, await VM.restore(snapshot) as copy:
        other = Agent(copy.ports[PORT])
        assert len({before, await agent.run(ask), await other.run(ask)}) == 3
        assert await copy.balloon.set(16) == 16
        assert (await copy.balloon.stats()).actual_mib == 16
        assert (await vm.balloon.stats()).actual_mib == 0
        await other.run("echo of the copy >/mine; sync")
        assert await agent.run("ls /mine 2>/dev/null || echo none") == "none\n"
