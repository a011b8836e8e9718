"""The QEMU machine: what a Machine (machine/base.py) promises, kept by a guest in a QEMU child (process.py).

The guest's effects may come before ``start`` has returned.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from asyncvmm.effects import Port
from asyncvmm.errors import ConfigError, SnapshotMismatch, StateError
from asyncvmm.machine.base import AccelName, BootPlan, EffectSink, Evidence
from asyncvmm.machine.pacing import Pacer
from asyncvmm.machine.qemu.attachments import Attachments
from asyncvmm.machine.qemu.balloon import QmpBalloon
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.command import QemuAccel, QemuBinary, choose_machine_type, kernel_cmdline
from asyncvmm.machine.qemu.counts import QemuCounts
from asyncvmm.machine.qemu.files import check_readable, join_initrd
from asyncvmm.machine.qemu.guest_memory import GuestMemory
from asyncvmm.machine.qemu.ports import ChannelStream
from asyncvmm.machine.qemu.process import QemuProcess
from asyncvmm.machine.qemu.restoring import StateFile
from asyncvmm.machine.qemu.saved_facts import (
    STATE,
    check,
    check_can_save,
    facts_of,
    saved_input,
    saved_machine,
    with_saved_mac,
)
from asyncvmm.machine.qemu.saving import StateSaver
from asyncvmm.machine.saved import RestorePlan, SavedMachine
from asyncvmm.machine.waiting import in_thread, wait_out
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.timing.timeline import Span, Timeline

if TYPE_CHECKING:
    from asyncvmm.snapshot.memory_writer import MemoryWriter
    from asyncvmm.vsock.host import VsockHost

_State = Literal["new", "starting", "running", "ended"]


class QemuMachine:
    """A Machine (machine/base.py) on QEMU. ``qemu`` None finds one; ``accel`` is QEMU's own accelerator.

    ``metrics`` is where to count what QEMU can tell; None counts nowhere. ``balloon`` is its balloon once it is
    started, None without one.
    """

    accel: AccelName = "qemu"

    def __init__(
        self,
        plan: BootPlan,
        timeline: Timeline,
        on_effects: EffectSink,
        metrics: VmMetrics | None = None,
        *,
        accel: QemuAccel = "tcg",
        qemu: QemuBinary | None = None,
    ) -> None:
        self._plan = plan
        self._timeline = timeline
        self._pacer = Pacer(on_effects, lambda: None)
        self._qemu_accel = accel
        self._qemu = qemu
        self._state: _State = "new"
        self._is_prepared = False
        self._is_as_restored = False
        self._process: QemuProcess | None = None
        self._initrd: int | None = None
        self._memory: GuestMemory | None = None
        self._saver: StateSaver | None = None
        self._metrics = VmMetrics() if metrics is None else metrics
        self._attachments = Attachments(plan, self._metrics)
        self._counts = QemuCounts(self._metrics, plan)
        self.balloon: QmpBalloon | None = None

    # -- the protocol ----------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Check the files and find QEMU.

        Raises KernelError, InitrdError, CmdlineError, QemuUnavailable, HostError.
        """
        self._require_new("prepare")
        try:
            with self._timeline.phase("qemu_cmd_build"):
                self._qemu = await self._prepare()
            self._require_new("prepare")
        except BaseException:
            await self.stop()
            raise
        self._is_prepared = True

    async def start(self) -> None:
        """Start QEMU and let the guest run. Cancelled or failed, it leaves nothing behind.

        Raises KernelError, InitrdError, CmdlineError, QemuUnavailable, HostError, or MachineError, whose
        ``retryable`` says whether the host merely was short of something.
        """
        if not self._is_prepared:
            await self.prepare()
        self._require_new("start")
        self._state = "starting"
        try:
            assert self._qemu is not None
            with self._timeline.phase("qemu_fork"):
                self._memory = GuestMemory.new(self._plan.memory_mib << 20)
                process = await self._spawn(self._qemu, self._memory)
            with self._timeline.phase("qemu_qmp_connect"):
                await self._running(process)
        except BaseException:
            await self.stop()
            raise

    async def write(self, port: Port, data: bytes) -> None:
        """Send bytes to the guest's serial port. Cancelled, it has sent a beginning of them. Raises StateError."""
        await self._running_process().serial.channels[port].write(data)

    async def pause(self) -> None:
        """Stop every vCPU. Raises StateError or MachineError."""
        if self._process is not None:
            self._process.pausing = True
        await self._command("stop")

    async def resume(self) -> None:
        """Let the vCPUs run on. Raises StateError or MachineError."""
        begin_ns = self._timeline.clock()
        await self._command("cont")
        if self._is_as_restored:
            self._is_as_restored = False
            self._timeline.record(Span("resume_kvm_run", begin_ns, self._timeline.clock()))
        if self._process is not None:
            self._process.pausing = False
        if self._saver is not None:
            self._saver.forget()

    async def expect_save(self) -> None:
        """Nothing: QEMU is ready."""

    async def precopy(self, memory: MemoryWriter) -> None:
        """Nothing: QEMU does not say what its guest writes meanwhile. Raises StateError."""
        self._running_process()

    async def save(self, memory: MemoryWriter, *, difference_of: str | None = None) -> SavedMachine:
        """As the protocol says; always all of memory. What was sent to a port of the virtio console, and was not read
        yet, goes to this machine alone.

        Raises StateError, SnapshotFailed, MachineError.
        """
        process = self._running_process()
        if not process.pausing:
            raise StateError("save", expected="a paused machine", state="running")
        check_can_save(self._plan, difference_of)
        assert self._saver is not None
        unread = await process.serial.unread(lambda: self._command("query-status"))
        state = await self._saver.save(memory)
        return saved_machine(self._plan, self._facts(), state, memory.map(), unread)

    def saved_as(self, name: str) -> None:
        """Nothing: there are no differences on QEMU."""

    async def restore(self, plan: RestorePlan) -> None:
        """As the protocol says. The kernel and initrd of the boot plan are not needed, and not looked at.

        Raises SnapshotMismatch, SnapshotDamaged, QemuUnavailable, HostError, MachineError.
        """
        self._require_new("restore")
        try:
            unread = saved_input(plan.saved)
            with self._timeline.phase("qemu_cmd_build"):
                await in_thread(lambda: self._prepare_restore(plan.saved))
            with self._timeline.phase("memory_state_write"):
                await in_thread(lambda: self._take_memory(plan))
            self._require_new("restore")
            await self._become(plan.saved.sections[STATE])
            self._running_process().serial.send_unread(unread)
            self._is_as_restored = True
        except BaseException:
            await self.stop()
            raise

    async def request_shutdown(self) -> None:
        """Press the ACPI power button. Raises StateError or MachineError."""
        await self._command("system_powerdown")

    async def stop(self) -> None:
        """Kill QEMU, reap it, free everything; a cancellation is heard once that is done. May be called again."""
        try:
            await self._finish()
        finally:
            freed = asyncio.ensure_future(self._attachments.aclose())
            await wait_out(freed)
            freed.result()

    async def _finish(self) -> None:
        try:
            if self._process is not None:
                await self._process.kill()
        finally:
            if self._process is None or self._process.child is None:
                self._free()

    def exits(self) -> None:
        """None: QEMU keeps its exits to itself."""

    async def evidence(self) -> Evidence:
        """Nothing: QEMU does not say where its guest stands."""
        return Evidence()

    def guest_instant(self, tsc: int) -> tuple[int, int] | None:
        """By when the vCPUs were let run, with TCG and until they are first stopped; else None."""
        tsc_of_guest = None if self._process is None else self._process.guest_tsc
        return None if tsc_of_guest is None else tsc_of_guest.instant(tsc)

    def guest_time(self) -> None:
        """None: QEMU keeps its guest's counter to itself."""

    def activity(self) -> int:
        """Bytes written to the virtio console's ports."""
        return sum(port.received for port in self._attachments.channels)

    def watch_port(self, port: int, value: int | None, told: Callable[[int], None]) -> Callable[[], None]:
        """None can be: QEMU does not tell."""
        raise ConfigError(f"watched port {port:#x}", expected="a machine on KVM", found="one on QEMU")

    def progress(self) -> int:
        """Serial bytes the guest has written so far."""
        return 0 if self._process is None else self._process.serial.received

    @property
    def ports(self) -> Mapping[str, ChannelStream]:
        """The virtio console's ports by name, from the start on; their bytes outlive the machine."""
        return self._attachments.ports

    @property
    def vsock(self) -> VsockHost | None:
        """The host's end of the guest's sockets, from the start on; None without a vsock device."""
        vsock = self._attachments.vsock
        return None if vsock is None else vsock.host

    # -- starting --------------------------------------------------------------------------------------------------

    async def _prepare(self) -> QemuBinary:
        """Everything that can fail before there is a process."""
        kernel_cmdline(self._plan, self._qemu_accel)
        await in_thread(self._open_files)
        return await in_thread(find_qemu) if self._qemu is None else self._qemu

    def _open_files(self) -> None:
        check_readable(self._plan)
        self._attachments.open_drives()
        if self._plan.appended:
            self._initrd = join_initrd(self._plan)

    def _prepare_restore(self, saved: SavedMachine) -> None:
        if self._qemu is None:
            self._qemu = find_qemu()
        check(saved, self._facts())
        self._plan = with_saved_mac(self._plan, saved)
        self._attachments.open_drives()

    def _take_memory(self, plan: RestorePlan) -> None:
        if len(plan.layers) != 1:
            raise SnapshotMismatch("snapshot", expected="all of memory in one file", found=f"{len(plan.layers)} files")
        gives_back = self._plan.devices.balloon is not None
        self._memory = GuestMemory.of_snapshot(plan.layers[0], self._plan.memory_mib << 20, gives_back=gives_back)

    async def _become(self, state: bytes) -> None:
        assert self._qemu is not None
        assert self._memory is not None
        self._state = "starting"
        with self._timeline.phase("qemu_fork"), StateFile(state) as file:
            process = await self._spawn(self._qemu, self._memory, file.fd)
        with self._timeline.phase("qemu_qmp_connect"):
            await process.answered(process.qmp.negotiated)
        with self._timeline.phase("device_state_restore"):
            await self._running(process)

    async def _spawn(self, qemu: QemuBinary, memory: GuestMemory, state: int | None = None) -> QemuProcess:
        """Start QEMU, from its kernel or with a saved state, which is in the file ``state``."""
        process = QemuProcess(self._plan, self._qemu_accel, self._pacer, memory, self._free, state)
        self._process = process
        self._saver = StateSaver(process.qmp.execute, memory)
        if self._plan.devices.balloon is not None:
            is_pci = choose_machine_type(self._plan) == "q35"
            group = self._metrics.balloon
            self.balloon = QmpBalloon(process.qmp.execute, self._plan, group, is_pci=is_pci, version=qemu.version)
        await process.spawn(qemu, self._attachments, self._counts, self._initrd)
        self._close_initrd()
        return process

    async def _running(self, process: QemuProcess) -> None:
        """Until QEMU has taken its command line and lets the vCPUs run, or holds them where they were saved."""
        await process.answered(process.qmp.started)
        if self._state == "starting":
            # Else the guest has come to its end already, as its effects say.
            self._state = "running"

    # -- ending ----------------------------------------------------------------------------------------------------

    def _free(self) -> None:
        """There is no QEMU, or none any more."""
        self._state = "ended"
        if self._process is not None:
            self._process.close()
        if self._memory is not None:
            self._memory.close()
        self._attachments.close()
        self._close_initrd()

    def _close_initrd(self) -> None:
        if self._initrd is not None:
            os.close(self._initrd)
            self._initrd = None

    # -- small things ----------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        assert self._qemu is not None
        return facts_of(self._plan, self._qemu, self._qemu_accel)

    async def _command(self, name: str) -> None:
        await self._running_process().qmp.execute(name)

    def _require_new(self, what: str) -> None:
        if self._state != "new":
            raise StateError(what, expected="a new machine", state=self._state)

    def _running_process(self) -> QemuProcess:
        if self._process is None or self._state != "running":
            raise StateError("the guest's machine", expected="running", state=self._state)
        return self._process
