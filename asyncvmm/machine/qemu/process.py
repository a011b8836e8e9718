"""One QEMU: its child process with QMP and serial lines on socket pairs, from before it is started until it has ended.

Everything arrives in callbacks of the event loop: once it is started there is no task or thread to be cancelled, and
the child is never waited for by polling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from asyncvmm.errors import MachineError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.pacing import Pacer
from asyncvmm.machine.qemu.attachments import Attachments
from asyncvmm.machine.qemu.balloon import first_size
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.child import Child
from asyncvmm.machine.qemu.command import ChildDescriptors, MemoryEnd, QemuAccel, QemuBinary, build_command
from asyncvmm.machine.qemu.control import QmpControl
from asyncvmm.machine.qemu.counts import QemuCounts
from asyncvmm.machine.qemu.ending import GuestEnd
from asyncvmm.machine.qemu.guest_memory import GuestMemory
from asyncvmm.machine.qemu.guest_tsc import GuestTsc
from asyncvmm.machine.qemu.qmp import QmpEvent
from asyncvmm.machine.qemu.restoring import incoming
from asyncvmm.machine.qemu.serial_lines import SerialLines
from asyncvmm.machine.waiting import wait_out

_log = logging.getLogger("asyncvmm.devices")


class QemuProcess:
    """``plan``'s guest, with ``memory``; with ``state``, a descriptor, it goes on from what was saved there.

    What the guest does, its end too, goes to ``pacer``; ``on_end`` hears that the child has ended, once all of that is
    said. ``serial``, ``qmp``: the conversation with it. ``child`` is None until ``spawn``. ``pausing``: whether a stop
    of the vCPUs was asked for. ``guest_tsc`` is None where the guest's counter cannot be known.

    Raises MachineError when there are no descriptors left.
    """

    def __init__(
        self,
        plan: BootPlan,
        accel: QemuAccel,
        pacer: Pacer,
        memory: GuestMemory,
        on_end: Callable[[], None],
        state: int | None = None,
    ) -> None:
        self._plan, self._accel, self._pacer, self._memory = plan, accel, pacer, memory
        self._on_end, self._state = on_end, state
        self._loop = asyncio.get_running_loop()
        self._end = GuestEnd(pacer)
        self._gone = self._loop.create_future()
        self._spawned: asyncio.Future[None] | None = None
        self._is_doomed = False
        self._counts: QemuCounts | None = None
        self.child: Child | None = None
        self.pausing = state is not None
        self.guest_tsc = GuestTsc() if accel == "tcg" and state is None else None
        first = first_size(plan) if state is None else incoming(state)
        self._channel = Channel(self._loop)
        try:
            self.serial = SerialLines(self._loop, pacer)
        except BaseException:
            self._channel.close()
            raise
        restores = state is not None
        self.qmp = QmpControl(self._channel, self._on_event, self._fail, self._on_running, first, restores=restores)

    async def spawn(self, qemu: QemuBinary, attachments: Attachments, counts: QemuCounts, initrd: int | None) -> None:
        """Start QEMU, with the devices' ``attachments``; ``counts`` are kept of it from now on.

        ``initrd``: a descriptor, None for the plan's file. Every descriptor of the guest's stays open until then.
        Cancelled or failed, it leaves no child. Raises ConfigError, HostError, MachineError.
        """
        self._counts = counts
        command, descriptors = self._command(qemu, attachments, initrd)
        self._spawned = self._loop.create_future()
        try:
            self.child = await Child.start(command, descriptors)
        finally:
            self._spawned.set_result(None)
        self.child.watch(self._on_child_end)
        if self._is_doomed:
            self.child.kill()
        self._channel.peer.close()
        attachments.release_ends()
        counts.watch_ports(self.serial.channels.values(), attachments.channels)
        self.serial.watch()

    def _command(self, qemu: QemuBinary, attachments: Attachments, initrd: int | None) -> tuple[list[str], list[int]]:
        """The words that start it, and the descriptors they name."""
        ends = ChildDescriptors(
            qmp=self._channel.peer.fileno(),
            console=self.serial.channels["console"].peer.fileno(),
            control=self.serial.channels["control"].peer.fileno(),
            memory=MemoryEnd(self._memory.fd, self._memory.shared),
            devices=attachments.connect(self._loop, self._device_failed),
            restores=self._state is not None,
        )
        others = (initrd, self._state, self._plan.resources.net_fd)
        command = build_command(self._plan, qemu, self._accel, ends, self._initrd_path(initrd))
        return command, [*ends.all(), *(fd for fd in others if fd is not None)]

    def _initrd_path(self, initrd: int | None) -> str | None:
        if initrd is not None:
            return f"/proc/self/fd/{initrd}"
        return None if self._plan.initrd is None else str(self._plan.initrd)

    async def answered(self, answer: asyncio.Future[Any]) -> None:
        """Until QEMU has answered. Raises the error that says why, if it has ended instead."""
        try:
            await answer
        except MachineError:
            if self.child is None or self.child.status is None:
                raise
            raise self._end.of_start(self.child, reads_state=self.qmp.reads_state) from None

    async def kill(self) -> None:
        """End it, asked a last time for its counts, and reap it; its end is no news. One that is being started is
        started first. A cancellation is heard after.
        """
        try:
            if self._spawned is not None:
                await wait_out(self._spawned)
        finally:
            if self.child is not None:
                await self._kill(self.child)

    async def _kill(self, child: Child) -> None:
        self._end.be_silent()
        try:
            if self._counts is not None:
                await self._counts.finish()
        finally:
            child.kill()
            await wait_out(self._gone)
            await self._pacer.finish()

    def close(self) -> None:
        """Free the sockets; who waits at one is woken. May be called again."""
        self.serial.close()
        if self._counts is not None:
            self._counts.close()
        self.qmp.close()

    # -- what it tells ---------------------------------------------------------------------------------------------

    def _on_running(self) -> None:
        if self.guest_tsc is not None:
            self.guest_tsc.running()
        if self._counts is not None:
            self._counts.watch_disks(self.qmp.ask)

    def _on_event(self, event: QmpEvent) -> None:
        if self.guest_tsc is not None and event.name == "RESUME":
            self.guest_tsc.resumed(event.realtime_ns)
        elif self.guest_tsc is not None and event.name == "STOP":
            self.guest_tsc.stopped()
        if event.name == "STOP" and not self.pausing:
            self.qmp.ask("query-status", self._end.hear_halt)
        self._end.hear(event)

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _on_child_end(self) -> None:
        """Read what is left, say why."""
        assert self.child is not None
        # What the child left in its sockets is a few hundred KiB at the most.
        while self.qmp.read():
            pass
        while self.serial.hand_out():
            pass
        if self.qmp.has_started:
            self._end.tell_end(self.child)
        self._on_end()
        self._gone.set_result(None)

    def _fail(self, error: MachineError) -> None:
        """QMP broke: nothing more can be said to this QEMU."""
        self._end.tell("machine", str(error))
        self._doom()

    def _device_failed(self, error: Exception) -> None:
        _log.error("a device of %s failed", self._plan.name, exc_info=error)
        self._end.fail(error)
        self._doom()

    def _doom(self) -> None:
        """Kill it, as soon as there is something to kill."""
        self._is_doomed = True
        if self.child is not None:
            self.child.kill()
