"""What PID 1 does behind a snapshot, in Linux: every clone has entropy of its own and the host's time before its
workload runs, however long it waits for its turn on the host's processors.

Clones in a normal run: 4. For more, set ASYNCVMM_CLONES. All are there at the same time, but those that have spoken are
held: an idle Linux takes an eighth of the lab's one processor, and a tenth of them leaves the event loop no turn.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import anyio
import attrs

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.events.types import Event, GuestGoDone, GuestHeartbeat
from asyncvmm.machine.host_clock import realtime_ahead_ns
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.snapshot import Snapshot
from tests.lab.conftest import PATIENCE_S

CLONES = int(os.environ.get("ASYNCVMM_CLONES", "4"))
AT_ONCE = 4
"""Clones that run at the same time."""
LEEWAY_NS = 10_000_000
WORKLOAD = ("sh", "-c", "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; while :; do sleep 1; done")


@attrs.define
class Clone:
    """One clone, as it is heard of from its beginning on. ``first``: the first line of its workload. ``clock_error``:
    how far its clock was from the host's when PID 1 had set it, and how sure that is, in ns."""

    said: list[Event] = attrs.field(factory=list)
    console: ConsoleReader | None = None
    first: bytes = b""
    clock_error: tuple[int, int] | None = None
    beat: anyio.Event = attrs.field(factory=anyio.Event)

    def prepare(self, vm: VM) -> None:
        """Listen before anything is done with it."""
        vm.events.attach(self.hear)
        self.console = vm.console.subscribe()

    def hear(self, event: Event) -> None:
        self.said.append(event)
        if isinstance(event, GuestHeartbeat):
            self.beat.set()

    async def hear_first_line(self) -> None:
        assert self.console is not None
        text = b""
        async for chunk in self.console:
            text += chunk
            if b"\n" in text:
                break
        self.first = text.partition(b"\n")[0].strip()

    def look_at_clock(self, vm: VM) -> None:
        done = next(event for event in self.said if isinstance(event, GuestGoDone))
        assert vm._machine is not None
        placed = vm._machine.guest_instant(done.tsc)
        assert placed is not None
        error_ns = done.realtime_ns - placed[0] - realtime_ahead_ns()
        self.clock_error = error_ns, placed[1]

    async def beats_on(self, vm: VM) -> None:
        """Let it run until its PID 1 says that it does."""
        self.beat = anyio.Event()
        await vm.resume()
        await self.beat.wait()
        await vm.pause()


async def restored(snapshot: Snapshot, count: int, *, window: bool) -> list[Clone]:
    """Clones, all there at once, each held when it has spoken; ``window``: its workload has yet to begin. Then each
    has lived on."""
    clones = [Clone() for _ in range(count)]
    vms: dict[int, VM] = {}
    limit = anyio.CapacityLimiter(AT_ONCE)

    async def restore(number: int, clone: Clone) -> None:
        async with limit:
            vms[number] = vm = await held.enter_async_context(await VM.restore(snapshot, prepare=clone.prepare))
            if window:
                await clone.hear_first_line()
            clone.look_at_clock(vm)
            await vm.pause()

    async def live_on(number: int, clone: Clone) -> None:
        async with limit:
            await clone.beats_on(vms[number])

    async with AsyncExitStack() as held:
        for step in (restore, live_on):
            async with anyio.create_task_group() as group:
                for number, clone in enumerate(clones):
                    group.start_soon(step, number, clone)
        assert {vm.state for vm in vms.values()} == {"paused"}
    return clones


async def story() -> None:
    config = VMConfig(memory_mib=128, accel="kvm", workload=WORKLOAD, pre_exec_window=True)
    when = SnapshotResources(on_pre_exec=True, quiesce_ms=20)
    original = Clone()
    snapshots: list[Snapshot] = []
    with anyio.fail_after(PATIENCE_S + 3 * CLONES):
        async with VM(config) as vm:
            original.prepare(vm)

            async def take() -> None:
                snapshots.append(await vm.snapshot(when))

            async with anyio.create_task_group() as group:
                group.start_soon(take)
                await vm.boot()
            await original.hear_first_line()
            snapshots.append(await vm.snapshot(then="stop"))
        in_window, running = snapshots
        clones = await restored(in_window, CLONES, window=True)
        others = await restored(running, 2, window=False)
    assert in_window.guest.in_window
    lines = [clone.first for clone in (original, *clones)]
    assert all(len(line) == 32 for line in lines), lines
    assert len(set(lines)) == CLONES + 1
    for clone in (*clones, *others):
        assert clone.clock_error is not None
        error_ns, doubt_ns = clone.clock_error
        assert abs(error_ns) <= LEEWAY_NS + doubt_ns


def test_every_clone_has_bytes_of_its_own_and_the_host_s_time() -> None:
    anyio.run(story, backend_options={"use_uvloop": True})
