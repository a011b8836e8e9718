"""VM: one microVM as the caller has it, whatever machine is underneath.

    async with VM(VMConfig(memory_mib=256, vcpus=2)) as vm:
        timing = await vm.boot()

States: new -> starting -> booting -> ready <-> paused -> stopped. A VM that fails at any point ends in ``failed`` with
everything freed. A VM belongs to the event loop that boots it: calls from another one raise StateError.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import anyio
import anyio.lowlevel

from asyncvmm.accel import AccelChoice, choose_accel
from asyncvmm.activities import Activities
from asyncvmm.attempt import Attempt
from asyncvmm.config import VMConfig
from asyncvmm.console import Console
from asyncvmm.effects import Stopped
from asyncvmm.errors import AsyncVMMError, BootError, GuestStopped, MachineError, StateError
from asyncvmm.events.hub import EventHub
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.outputs import Target
from asyncvmm.events.types import VmError, VmState, exit_counts
from asyncvmm.home_loop import HomeLoop
from asyncvmm.machine.base import AccelName, Evidence, Machine
from asyncvmm.machine.of_vm import MachineProperties
from asyncvmm.machine.waiting import wait_out
from asyncvmm.readiness import GuestFacts, Readiness, complete, describe_end
from asyncvmm.report import BootReport
from asyncvmm.snapshot.of_vm import SnapshotCalls
from asyncvmm.timing.of_vm import TimingProperties
from asyncvmm.timing.timeline import Span, Timeline
from asyncvmm.timing.vm_timing import VmTiming
from asyncvmm.watch import GuestWatch
from asyncvmm.workload_hold import WorkloadHold

if TYPE_CHECKING:
    from asyncvmm.snapshot.restoring import Restoring
    from asyncvmm.upkeep import Upkeep

State = Literal["new", "starting", "booting", "ready", "paused", "stopped", "failed"]

BOOT_ATTEMPTS = 3
"""Tries before contention for the host's resources counts as failure."""

_RETRY_PAUSE_S = 0.2
_ORDINARY_ENDS = ("shutdown", "reset", "debug-exit")


class VM(TimingProperties, MachineProperties, SnapshotCalls):
    """One microVM. ``boot`` starts it and returns when the guest is ready; ``stop`` (or leaving the block) frees it.

    ``events`` is its EventHub, ``console`` its Console, ``config`` what was asked for, ``name`` the ``vm`` of events.
    """

    def __init__(self, config: VMConfig | None = None) -> None:
        self.config = config or VMConfig()
        self.name = self.config.name or os.urandom(4).hex()
        self.events = EventHub()
        self.console = Console(self._write_console)
        self.timeline = Timeline()
        self._report = BootReport(self.events, self.timeline)
        self._state: State = "new"
        self._home = HomeLoop(lambda: self._state)
        self._attempt: Attempt | None = None
        self._watch = self._new_watch()
        self._sinks: list[JsonLines] = []
        self._ending: asyncio.Task[None] | None = None
        self._freed = False
        self._ended = False
        self._readiness = Readiness(self.events, self._facts, self.config.boot_timeout_s, self.config.stall_timeout_s)
        self._upkeep: Upkeep | None = None
        self._activities = Activities()
        self._hold = WorkloadHold(self.config.pre_exec_window)
        self._going: asyncio.Task[None] | None = None
        self._being_saved = False
        self._restoring: Restoring | None = None

    # -- what can be asked -----------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the VM is in its life."""
        return self._state

    # -- what can be done ------------------------------------------------------------------------------------------

    def stream_to(self, target: Target) -> JsonLines:
        """Write every event from now on as JSON lines to ``target`` (see events.outputs). Closed with the VM.

        Raises ConfigError if the target cannot be opened.
        """
        sink = JsonLines(target, self.name, self._epoch_ns)
        self.events.attach(sink.publish)
        self._sinks.append(sink)
        return sink

    async def boot(self) -> VmTiming:
        """Start the guest; returns when it says READY.

        Raises ConfigError or HostError before anything is started, MachineError if the machine fails, BootError with
        the evidence if the guest does not become ready, StateError if stop() is called meanwhile. Cancelled or failed,
        it leaves nothing behind.
        """
        self._home.claim("boot")
        if self._state != "new" or self._ending is not None:
            raise StateError("boot", expected="a new VM", state=self._state if self._ending is None else "stopping")
        self._go("starting")
        async with self._freed_unless_done("boot"):
            await anyio.lowlevel.checkpoint()  # a snapshot() in a task that was begun before may have to be known
            with self.timeline.phase("total"):
                accel = await self._boot()
            return self._report.tell_ready(accel, self.guest_profile, self.guest_clock)
        raise AssertionError("unreachable")

    async def pause(self) -> None:
        """Stop every vCPU. Raises StateError unless the VM is ready, or if the guest ends meanwhile.

        A cancellation is heard once it is done.
        """
        await self._timed("pause_vm", self._change("ready", "paused", self._pause))

    async def resume(self) -> None:
        """Let the vCPUs run on. Raises StateError unless the VM is paused, and while it is being saved.

        A cancellation is heard once it is done.
        """
        if self._being_saved:
            raise StateError("resume", expected="a VM that is not being saved", state=self._state)
        self._home.check("resume")
        self._require("paused")
        if self._restoring is not None and self._machine is not None:
            await self._restoring.tell_untold(self._machine)
        await self._let_run()

    async def _let_run(self) -> None:
        try:
            await self._timed("resume_vm", self._change("paused", "ready", self._resume))
        finally:
            self._let_workload_go()

    async def shutdown(self, timeout_s: float = 30.0) -> None:
        """Ask the guest to power off, wait ``timeout_s`` seconds for it at the most, then stop it in any case."""
        if self._machine is not None and self._state == "ready" and not self.events.stopped.done:
            self._home.check("shutdown")
            with anyio.move_on_after(timeout_s), suppress(StateError, MachineError):
                # Neither is news: the guest, or its machine, came to its end by itself meanwhile.
                await self._ask_to_power_off(self._machine)
                await self.events.stopped
        await self.stop()

    async def stop(self) -> None:
        """End the guest at once and free everything. May be called again, and from any state: it ends a boot, too."""
        if self._ending is None or not self._ending.done():
            self._home.claim("stop")
        try:
            await self._activities.end_all()
        finally:
            await self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- booting ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _freed_unless_done(self, what: str) -> AsyncIterator[None]:
        """What the block does, stop() may end. If it does not come to its end, the VM does."""
        try:
            with self._activities.begin(what):
                yield
        except StateError:
            await self._end()
            raise
        except AsyncVMMError as error:
            await self._fail(error)
            raise
        except BaseException:
            await self._end()
            raise

    async def _boot(self) -> AccelName:
        choice = await self._choose()
        for attempt in range(BOOT_ATTEMPTS):
            self._report.begin_attempt(attempt)
            try:
                return await self._attempt_boot(choice)
            except AsyncVMMError as error:
                self._report.tell_phases()
                if not getattr(error, "retryable", False) or attempt == BOOT_ATTEMPTS - 1:
                    raise
                with self.timeline.phase("retry_pause"):
                    await self._discard_machine()
                    await anyio.sleep(_RETRY_PAUSE_S * (attempt + 1))
        raise AssertionError("unreachable")

    async def _choose(self) -> AccelChoice:
        with self.timeline.phase("accel"):
            choice = await choose_accel(self.config.accel)
        if self.events.listening:
            self.events.publish(choice.event(self._now()))
        self._report.tell_phases()
        return choice

    async def _become(self, restoring: Restoring) -> None:
        """Instead of booting: become the VM that was saved."""
        self._home.claim("restore")
        self._restoring = restoring
        self._go("starting")
        async with self._freed_unless_done("restore"):
            total = self.timeline.phase("total")
            with total:
                if restoring._launch is None:  # else each microsecond counts
                    self.timeline.record(Span("snapshot_open", restoring.begin_ns, total.start_ns))
                total.start_ns = restoring.begin_ns
                self._attempt = attempt = await restoring.attempt(self.config, self.name)
                self._watch = self._new_watch()
                machine = await attempt.make(restoring.sink(self._watch), self.metrics.groups)
                self._keep_up()
                await restoring.carry_out(machine)
            self._report.tell_phases()
            self._go("paused")
            await restoring.let_run(machine, self._let_run)
            self._poll_balloon()

    async def _attempt_boot(self, choice: AccelChoice) -> AccelName:
        with self.timeline.phase("setup"):
            self._hold.is_on = self.config.pre_exec_window
            self._attempt = Attempt(self.config, self.name, choice, self.timeline)
            await self._attempt.plan()
            self._watch = self._new_watch()
            machine = await self._attempt.make(self._watch.take, self.metrics.groups)
            self._keep_up()
        self._report.tell_phases()
        with self.timeline.phase("boot"):
            await machine.start()
            with self.timeline.phase("boot_wait"):
                self._report.tell_phases()
                if self._state == "starting":
                    self._go("booting")
                await self._readiness.wait(machine)
        if not self._ended:
            self._go("ready")
            self._poll_balloon()
            self._let_workload_go()
        return choice.accel

    def _keep_up(self) -> None:
        """Have metrics told from now on."""
        from asyncvmm.upkeep import Upkeep

        if self._upkeep is None:
            self._upkeep = Upkeep(self.metrics, self.config.metrics_interval_s)
        self._upkeep.start()

    def _poll_balloon(self) -> None:
        if self._upkeep is not None and self.config.balloon is not None and self.config.balloon.stats_interval_s:
            self._upkeep.poll(self.balloon, self.config.balloon.stats_interval_s)

    def _facts(self, reason: str, evidence: Evidence) -> GuestFacts:
        return {
            "reason": reason,
            "last_exit": evidence.last_exit,
            "rip": evidence.rip,
            "exits": self.exits,
            "phases": self.timeline.elapsed(),
            "serial_tail": self.console.tail,
            "state": self._state,
        }

    # -- the guest's end -------------------------------------------------------------------------------------------

    def _on_stop(self, stopped: Stopped) -> None:
        """The guest will not run again. Before READY that is a BootError, after it mostly an ordinary end."""
        if self._ended or self._freed:
            return
        self._ended = True
        found, facts = describe_end(stopped), self._facts(stopped.reason, Evidence(stopped.last_exit, stopped.rip))
        self.console.end()
        if not self.events.ready.done:
            self._readiness.end(BootError("boot", expected="READY", found=found, **facts))
        elif stopped.reason in _ORDINARY_ENDS:
            self._go("stopped")
            self.events.close(stopped.reason)
        else:
            self._go("failed")
            self._end_events(GuestStopped("guest", expected="an orderly end", found=found, **facts))

    def _end_events(self, error: AsyncVMMError) -> None:
        if self.events.listening:
            self.events.publish(VmError.of(self._now(), error))
        self.events.fail(error)

    async def _ask_to_power_off(self, machine: Machine) -> None:
        """By PID 1's control line if it is there, which always listens; else by the power button."""
        if self._watch.contract.ready_on_control:
            # A machine without ACPI cannot be switched off, only reset, which ends it as well.
            await machine.write("control", b"poweroff\n" if self.config.acpi else b"reboot\n")
        else:
            await machine.request_shutdown()

    async def _change(self, before: State, after: State, act: Callable[[Machine], Coroutine[Any, Any, None]]) -> None:
        """Have the machine do something, to its end even if cancelled: the state must say what is."""
        self._home.check("pause" if after == "paused" else "resume")
        self._require(before)
        assert self._machine is not None
        task = asyncio.get_running_loop().create_task(act(self._machine))
        try:
            await wait_out(task)
        finally:
            if not task.cancelled() and task.exception() is None and self._state == before and not self._ended:
                self._go(after)
        task.result()
        self._require(after)

    async def _pause(self, machine: Machine) -> None:
        await self._timed("vmm_pause_vm", machine.pause())

    async def _resume(self, machine: Machine) -> None:
        await self._timed("vmm_resume_vm", machine.resume())

    async def _timed(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it, and have the metrics' ``latencies_us`` say under ``name`` how long that took."""
        begin = self.timeline.clock()
        await work
        setattr(self.metrics.groups.latencies_us, name, (self.timeline.clock() - begin) // 1000)

    async def _end(self) -> None:
        await self._finish("stopped", None)

    async def _fail(self, error: AsyncVMMError) -> None:
        await self._finish("failed", error)

    async def _finish(self, final: Literal["stopped", "failed"], error: AsyncVMMError | None) -> None:
        """One task ends the VM, whoever asks first; all wait for it, and none ends it half-way by being cancelled."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._stop(final, error))
        await wait_out(self._ending)
        self._ending.result()

    async def _stop(self, final: Literal["stopped", "failed"], error: AsyncVMMError | None) -> None:
        if isinstance(error, BootError):
            await complete(error, self._machine)
        if error is not None and not self.events.stopped.done:
            self._end_events(error)
        self._freed = True
        if self._restoring is not None:
            await self._restoring.aclose()
        if self._upkeep is not None:
            await self._upkeep.rest()
        if self._attempt is not None:
            await self._attempt.free()
        if self._upkeep is not None:
            self._upkeep.stop()
        self._report.tell_phases()
        if self._state not in ("stopped", "failed"):
            self._go(final)
        self.console.end()
        self.events.close()
        for sink in self._sinks:
            await sink.aclose()

    async def _discard_machine(self) -> None:
        if self._attempt is not None:
            try:
                await wait_out(asyncio.ensure_future(self._attempt.free()))
            finally:
                self._attempt = None

    # -- small things ----------------------------------------------------------------------------------------------

    async def _write_console(self, data: bytes) -> None:
        self._home.check("console input")
        if self._machine is None or self._state not in ("booting", "ready"):
            raise StateError("console input", expected="a running guest", state=self._state)
        await self._machine.write("console", data)

    @cached_property
    def _epoch_ns(self) -> int:
        """The VM's time zero, in ns since 1970."""
        return time.time_ns() - (time.monotonic_ns() - self.timeline.start_ns)

    def _new_watch(self) -> GuestWatch:
        return GuestWatch(
            self.events,
            self.console,
            self.timeline,
            self._on_stop,
            on_captured=lambda: self._report.tell_captured(self.guest_profile),
            serial_lines=self.config.serial_lines,
            guest_instant=lambda tsc: self._machine.guest_instant(tsc) if self._machine else None,
        )

    def _now(self) -> int:
        return self.timeline.clock() - self.timeline.start_ns

    def _require(self, state: State) -> None:
        if self._state != state:
            raise StateError("VM", expected=f"state {state}", state=self._state)

    def _go(self, state: State) -> None:
        previous, self._state = self._state, state
        if self.events.listening:
            exits = exit_counts(self.exits) if state in ("stopped", "failed") else None
            made_of = self._made_of() if state == "starting" else {}
            self.events.publish(VmState(self._now(), state, previous, exits, **made_of))
