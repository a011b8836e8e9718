"""What PID 1 does behind a snapshot, in Linux: every clone has entropy of its own and the host's time before its
workload runs, however long it waits for its turn on the host's processors.

Clones in a normal run: 4. For more, set ASYNCVMM_CLONES.
"""

from __future__ import annotations

import os
import time

import anyio
import attrs

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.events.types import Event, GuestGoDone
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.snapshot import Snapshot
from tests.lab.conftest import PATIENCE_S

CLONES = int(os.environ.get("ASYNCVMM_CLONES", "4"))
LEEWAY_NS = 10_000_000
WORKLOAD = ("sh", "-c", "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; while :; do sleep 1; done")


@attrs.define
class Clone:
    """One clone, as it is heard of from its beginning on."""

    said: list[Event] = attrs.field(factory=list)
    console: ConsoleReader | None = None

    def prepare(self, vm: VM) -> None:
        """Listen before anything is done with it."""
        vm.events.attach(self.said.append)
        self.console = vm.console.subscribe()

    async def line(self) -> bytes:
        """The first line of its workload."""
        assert self.console is not None
        text = b""
        async for chunk in self.console:
            text += chunk
            if b"\n" in text:
                break
        return text.partition(b"\n")[0].strip()

    def clock_error(self, vm: VM) -> tuple[int, int]:
        """How far its clock was from the host's when PID 1 had set it, and how sure that is, in ns."""
        done = next(event for event in self.said if isinstance(event, GuestGoDone))
        assert vm._machine is not None
        placed = vm._machine.guest_instant(done.tsc)
        assert placed is not None
        return done.realtime_ns - placed[0] - (time.time_ns() - time.monotonic_ns()), placed[1]


async def restored(snapshot: Snapshot, *, window: bool) -> tuple[bytes, tuple[int, int]]:
    """A clone's first line, if its workload has yet to begin, and its clock's error."""
    clone = Clone()
    async with await VM.restore(snapshot, prepare=clone.prepare) as vm:
        line = await clone.line() if window else b""
        return line, clone.clock_error(vm)


async def restored_at_once(snapshot: Snapshot, count: int, *, window: bool) -> list[tuple[bytes, tuple[int, int]]]:
    found: list[tuple[bytes, tuple[int, int]]] = []

    async def restore() -> None:
        found.append(await restored(snapshot, window=window))

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(restore)
    return found


async def story() -> None:
    config = VMConfig(memory_mib=128, accel="kvm", workload=WORKLOAD)
    with anyio.fail_after(PATIENCE_S + 3 * CLONES):
        async with VM(config) as vm:
            original = Clone()
            original.prepare(vm)
            snapshots: list[Snapshot] = []

            async def take() -> None:
                snapshots.append(await vm.snapshot(when=SnapshotResources(on_pre_exec=True, quiesce_ms=20)))

            async with anyio.create_task_group() as group:
                group.start_soon(take)
                await vm.boot()
            clones = await restored_at_once(snapshots[0], CLONES, window=True)
            running = await restored_at_once(await vm.snapshot(), 2, window=False)
            lines = [await original.line(), *(line for line, _ in clones)]
    assert all(len(line) == 32 for line in lines), lines
    assert len(set(lines)) == CLONES + 1
    for error_ns, doubt_ns in (told for _, told in [*clones, *running]):
        assert abs(error_ns) <= LEEWAY_NS + doubt_ns


def test_every_clone_has_bytes_of_its_own_and_the_host_s_time() -> None:
    anyio.run(story, backend_options={"use_uvloop": True})
