"""One virtio-mmio device of a KVM VM: its registers on the bus, its events on the loop.

A kick is an ioeventfd that the loop reads, an interrupt is an irqfd that the device's side writes, and the page of
registers is memory that the guest reads by itself: once the driver is up, a request takes no exit to userspace.

A device has one lock. A vCPU thread holds it while it answers a register access, the loop while the device works, so
that a reset, when its register write returns, has taken effect.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.mmio import VirtioMmio
from asyncvmm.devices.virtio.registers import (
    INTERRUPT_ACK,
    INTERRUPT_USED_BUFFER,
    QUEUE_NOTIFY,
)
from asyncvmm.errors import HostError
from asyncvmm.machine.device_faults import FaultReport
from asyncvmm.machine.kvm.abi import KVM_IOEVENTFD_FLAG_DATAMATCH, KvmIoeventfd, KvmIrqfd, Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.x86.layout import MMIO_SIZE, mmio_device

LAST_TURNS = 4
"""Turns that a queue has when its guest has ended: a full ring of requests as drivers make them needs no more."""

LAST_DESCRIPTORS = 2048
"""Once a device has looked at so many by then, the rest of what its guest left behind is dropped: the loop waits."""


def fence_of(lock: threading.Lock) -> Callable[[], None]:
    """What orders a store before a later load on every CPU: taking a lock and letting it go."""

    def fence() -> None:
        with lock:
            pass

    return fence


class VirtioSlot:
    """A device at place ``index`` among a VM's virtio-mmio devices; ``page`` has its registers. name, vm: the device's
    and the VM's, for the bus and the log.

    Made on any thread; ``watch`` and ``close`` are for the loop. Raises HostError without descriptors for it.
    """

    def __init__(
        self, index: int, device: VirtioDevice, memory: GuestView, page: memoryview, name: str, *, vm: str = ""
    ) -> None:
        self.name = name
        self.place = mmio_device(index)
        self.device = device
        self.lock = threading.RLock()
        self._due: set[int] = set()  # queues with a turn to come: a kick meanwhile must not give them another one
        self._still = False  # kicks wait
        self._owes_interrupt = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fail: Callable[[Exception], None] = lambda error: None
        self._interrupt_fd, self._acknowledged_fd, *self._kick_fds = _eventfds(2 + len(device.queues))
        self.transport = VirtioMmio(
            device,
            memory,
            self.lock,
            interrupt=self._interrupt,
            notify=self._kick_by_hand,
            gave_up=FaultReport(name, vm),
            page=page,
        )

    def attach(self, vm_fd: int) -> None:
        """Give KVM the line and the kicks. Raises KvmIoctlError."""
        ioctl(vm_fd, Request.KVM_IRQFD, KvmIrqfd(fd=self._interrupt_fd, gsi=self.place.gsi))
        for index, fd in enumerate(self._kick_fds):
            self._take_writes(vm_fd, QUEUE_NOTIFY, index, fd)
        # Nobody waits for this one: it is there so that acknowledging a used buffer is no exit.
        self._take_writes(vm_fd, INTERRUPT_ACK, INTERRUPT_USED_BUFFER, self._acknowledged_fd)

    def _take_writes(self, vm_fd: int, register: int, value: int, fd: int) -> None:
        event = KvmIoeventfd(value, self.place.address + register, 4, fd, KVM_IOEVENTFD_FLAG_DATAMATCH)
        ioctl(vm_fd, Request.KVM_IOEVENTFD, event)

    # -- on the loop -----------------------------------------------------------------------------------------------

    def watch(self, loop: asyncio.AbstractEventLoop, fail: Callable[[Exception], None]) -> None:
        """Serve kicks from now on. ``fail`` hears of an error of ours, which is none of the guest's. Raises HostError
        where the loop can watch no more, as at fs.epoll.max_user_watches."""
        self._loop, self._fail = loop, fail
        try:
            for index, fd in enumerate(self._kick_fds):
                loop.add_reader(fd, self._kicked, index, fd)
        except OSError as error:
            expected = f"a loop that can watch its {len(self._kick_fds)} kicks"
            raise HostError(f"virtio device {self.name}", expected=expected, found=error.strerror) from error

    def _kicked(self, index: int, fd: int) -> None:
        os.eventfd_read(fd)
        if index not in self._due:
            self._work(index)

    def _work(self, index: int) -> None:
        """One turn of a queue; the rest waits for the loop's next turn, behind everybody else's."""
        self._due.discard(index)
        if self._loop is None or self._still:
            return
        try:
            more = self.transport.kick(index)
        except Exception as error:  # a device of ours that is wrong must not fail in silence
            self._fail(error)
            return
        if more:
            self._due.add(index)
            self._loop.call_soon(self._work, index)

    # -- while the machine stands still: on the loop, no vCPU running ----------------------------------------------

    def stop(self) -> None:
        """Take nothing more from the guest. What is under way may come to its end."""
        self._still = True

    def hold(self) -> None:
        """Touch no guest memory, and raise no interrupt."""
        with self.lock:
            self._still = self.transport.held = True

    def release(self) -> None:
        """The opposite; nothing is done yet."""
        with self.lock:
            self._still = self.transport.held = False

    def go_on(self, *, interrupt: bool) -> None:
        """Released: look at every queue, since its kick may have come meanwhile, or have been on its way into a
        snapshot; so may an interrupt, which ``interrupt`` repeats. One too many does no harm.
        """
        with self.lock:
            interrupt = interrupt and self.transport.running
            if interrupt or self._owes_interrupt:
                self._owes_interrupt = False
                self._interrupt()
        if self._loop is not None:
            for index in range(len(self.device.queues)):
                if index not in self._due:
                    self._due.add(index)
                    self._loop.call_soon(self._work, index)

    # -- the end -----------------------------------------------------------------------------------------------------

    def work_off(self) -> None:
        """Serve what the guest left behind when it ended: its last kicks may not have been heard yet."""
        try:
            self._work_off()
        except Exception as error:  # as in _work; and nothing must keep a VM from being freed
            self._fail(error)

    def _work_off(self) -> None:
        """A turn for each queue, then another for those that have more."""
        end = self._walked() + LAST_DESCRIPTORS
        waiting = list(range(len(self.device.queues)))
        for _ in range(LAST_TURNS):
            waiting = [index for index in waiting if self._walked() < end and self.transport.kick(index)]

    def _walked(self) -> int:
        return sum(queue.walked for queue in self.device.queues)

    def close(self) -> None:
        """Serve no more, let go of guest memory. No vCPU thread may run any more."""
        if self._loop is not None:
            for fd in self._kick_fds:
                self._loop.remove_reader(fd)
            self._loop = None
        with self.lock:
            self.transport.close()
        for fd in (self._interrupt_fd, self._acknowledged_fd, *self._kick_fds):
            os.close(fd)

    # -- on any thread, with the lock held ---------------------------------------------------------------------------

    def _interrupt(self) -> None:
        if self.transport.held:
            self._owes_interrupt = True
        else:
            os.eventfd_write(self._interrupt_fd, 1)

    def _kick_by_hand(self, index: int) -> None:
        """A kick that no ioeventfd took."""
        os.eventfd_write(self._kick_fds[index], 1)


def registers_of(page: memoryview, index: int) -> memoryview:
    """The page of device number ``index`` among all devices' pages."""
    return page[index * MMIO_SIZE : (index + 1) * MMIO_SIZE]


def _eventfds(count: int) -> list[int]:
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise HostError("virtio device", expected=f"{count} free descriptors", found=error.strerror) from error
    return fds
