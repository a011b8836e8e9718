"""QueueService: how a device is served, whichever transport it has: kicks in, interrupts out, faults contained.

What is subtle about notifications is here and in queue.py. A driver that is not asked for a kick gives none, so between
a device's last look at a queue and the moment it asks, a chain may have come that nobody would ever kick for: it is
looked for afterwards. A device may also pop outside of a kick, when something on the host is done; the place where the
driver is to kick next then has to move, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Queue


class QueueService(ABC):
    """The part of a transport that works: ``device``'s queues, under its lock. See device.Transport."""

    device: VirtioDevice
    _lock: AbstractContextManager[object]

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether the driver is there, and neither side has given up."""

    def kick(self, index: int) -> bool:
        """Let the device work on queue ``index``; True if there is more to do. Takes the lock."""
        with self.session() as running:
            if not running:
                return False
            queue = self.device.queues[index]
            queue.disable_notification()
            queue.look()
            if self.device.process(index):
                return True
            queue.enable_notification()
            return queue.has_unseen
        return False

    @contextmanager
    def session(self) -> Iterator[bool]:
        """See device.Transport."""
        with self._lock:
            if not self.running:
                yield False
                return
            try:
                yield True
                self._rearm()
            except GuestFault as fault:
                self._fault(fault)
            finally:
                self._interrupt_for_used()

    def _rearm(self) -> None:
        for index, queue in enumerate(self._queues()):
            if queue.rearm():
                self._notify(index)

    def _interrupt_for_used(self) -> None:
        used = [index for index, queue in enumerate(self._queues()) if queue.take_interrupt()]
        if used:
            self._tell_used(used)

    @abstractmethod
    def _queues(self) -> Sequence[Queue]:
        """The queues that are served here, from number 0 on."""

    @abstractmethod
    def _notify(self, index: int) -> None:
        """Have queue ``index`` worked on soon, as if it had been kicked."""

    @abstractmethod
    def _tell_used(self, indices: Sequence[int]) -> None:
        """The driver wants to be interrupted for these queues."""

    @abstractmethod
    def _fault(self, fault: GuestFault) -> None:
        """The driver asked for something impossible."""
