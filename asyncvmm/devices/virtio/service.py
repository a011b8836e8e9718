"""QueueService: how a device is served, whichever transport it has: kicks in, interrupts out, faults contained.

What is subtle about notifications is here and in queue.py. A driver that is not asked for a kick gives none, so between
a device's last look at a queue and the moment it asks, a chain may have come that nobody would ever kick for: it is
looked for afterwards. A device may also pop outside of a kick, when something on the host is done; the place where the
driver is to kick next then has to move, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from types import TracebackType

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Queue


class Session:
    """See device.Transport. One serves every session of ``service``, those within another too: it remembers nothing."""

    __slots__ = ("_service",)

    def __init__(self, service: QueueService) -> None:
        self._service = service

    def __enter__(self) -> bool:
        self._service._lock.__enter__()
        return self._service.running

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if self._service.running:
                self._service._end_session(error)
            return isinstance(error, GuestFault)
        finally:
            self._service._lock.__exit__(None, None, None)


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

    @cached_property
    def _session(self) -> Session:
        return Session(self)

    def session(self) -> AbstractContextManager[bool]:
        """See device.Transport."""
        return self._session

    def _end_session(self, error: BaseException | None) -> None:
        """Of a driver that is there; ``error``: what ended it."""
        if isinstance(error, GuestFault):
            self._fault(error)
        used = []
        for index, queue in enumerate(self._queues()):
            if queue.is_touched:
                queue.is_touched = False
                if error is None and queue.rearm():
                    self._notify(index)
                if queue.take_interrupt():
                    used.append(index)
        if used:
            self._tell_used(used + self._told_with_them())

    def _told_with_them(self) -> list[int]:
        """Queues that were patient: the driver is interrupted anyway."""
        told = []
        for index, queue in enumerate(self._queues()):
            if queue.is_patient and queue.is_untold:
                queue.hurry()
                queue.is_touched = False
                if queue.take_interrupt():
                    told.append(index)
        return told

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
