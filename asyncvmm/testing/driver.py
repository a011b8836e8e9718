"""A driver for any virtio device: it negotiates through the real transport's registers, and owns the memory.

driver = Driver(VirtioRng(...))
assert len(driver.request(0, writable=[64])) == 64
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.mmio import VirtioMmio
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    QUEUE_DESC_LOW,
    QUEUE_DEVICE_LOW,
    QUEUE_DRIVER_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
)
from asyncvmm.testing.rings import DriverQueue, Used

_READY = STATUS_ACKNOWLEDGE | STATUS_DRIVER
MOST_TURNS = 10_000
"""Calls of process() for one kick: a device that never has enough is a bug."""


class Driver:
    """The guest's side of ``device``, which it brings up to DRIVER_OK unless ``start`` is False.

    memory_size: bytes of guest RAM, shared out evenly among the queues. queue_size: descriptors of each queue, None
    for as many as the device allows, up to 64. features: what to accept of the device's own features, None for all.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        memory_size: int = 1 << 20,
        queue_size: int | None = None,
        features: int | None = None,
        event_idx: bool = False,
        indirect: bool = False,
        start: bool = True,
    ) -> None:
        self.device = device
        self.memory = bytearray(memory_size)
        self.dirty: list[tuple[int, int]] = []
        self.view = GuestView([(0, memoryview(self.memory))], lambda address, size: self.dirty.append((address, size)))
        self.interrupts = 0
        self.kicks: list[int] = []
        self.faults: list[str] = []
        self._queue_size = queue_size
        self._wanted = device.features if features is None else features
        self._wanted |= 1 << VIRTIO_F_VERSION_1 | event_idx << VIRTIO_F_EVENT_IDX | indirect << VIRTIO_F_INDIRECT_DESC
        self._event_idx = event_idx
        self.transport = self.new_transport(device)
        self.queues: list[DriverQueue] = []
        if start:
            self.start()

    def new_transport(self, device: VirtioDevice) -> VirtioMmio:
        """A transport for a device that shares this driver's memory; restores are tested with it."""
        return VirtioMmio(
            device,
            self.view,
            threading.RLock(),
            interrupt=self._count_interrupt,
            notify=self.kicks.append,
            gave_up=self.faults.append,
        )

    def start(self) -> None:
        """From reset to DRIVER_OK, in the order of section 3.1.1. Raises AssertionError if the device refuses."""
        self.write(STATUS, STATUS_ACKNOWLEDGE)
        self.write(STATUS, _READY)
        self.accept(self._wanted)
        self.write(STATUS, _READY | STATUS_FEATURES_OK)
        assert self.read(STATUS) & STATUS_FEATURES_OK, "the device refused the features"
        self.set_up_queues()
        self.write(STATUS, _READY | STATUS_FEATURES_OK | STATUS_DRIVER_OK)

    def set_up_queues(self) -> None:
        """Give the device rings for all its queues, empty."""
        share = len(self.memory) // max(1, len(self.device.queues)) & ~15
        self.queues = [self._set_up(index, share) for index in range(len(self.device.queues))]

    def accept(self, features: int) -> None:
        """Write the driver's features."""
        for word in (0, 1):
            self.write(DRIVER_FEATURES_SEL, word)
            self.write(DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)

    def offered(self) -> int:
        """The device's features, as its registers show them."""
        found = 0
        for word in (0, 1):
            self.write(DEVICE_FEATURES_SEL, word)
            found |= self.read(DEVICE_FEATURES) << 32 * word
        return found

    def _set_up(self, index: int, share: int) -> DriverQueue:
        self.write(QUEUE_SEL, index)
        size = self._queue_size or min(self.read(QUEUE_NUM_MAX), 64)
        base = index * share
        queue = DriverQueue(self.memory, base, base + share, size, event_idx=self._event_idx)
        self.memory[base : base + share] = bytes(share)
        self.write(QUEUE_NUM, size)
        for register, address in (
            (QUEUE_DESC_LOW, queue.descriptors),
            (QUEUE_DRIVER_LOW, queue.driver_area),
            (QUEUE_DEVICE_LOW, queue.device_area),
        ):
            self.write(register, address & 0xFFFFFFFF)
            self.write(register + 4, address >> 32)
        self.write(QUEUE_READY, 1)
        return queue

    # -- registers -------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int = 4) -> int:
        """Read a register."""
        return self.transport.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        self.transport.write(offset, value, size)

    def config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space."""
        return bytes(self.read(CONFIG + offset + i, 1) for i in range(size))

    @property
    def status(self) -> int:
        """The device status field."""
        return self.read(STATUS)

    @property
    def needs_reset(self) -> bool:
        """Whether the device asked for a reset."""
        return self.transport.needs_reset

    def acknowledge(self) -> int:
        """Read the interrupt status and acknowledge it; returns what it was."""
        found = self.read(INTERRUPT_STATUS)
        self.write(INTERRUPT_ACK, found)
        return found

    def reset(self) -> None:
        """Write 0 to the status."""
        self.write(STATUS, 0)

    # -- requests --------------------------------------------------------------------------------------------------

    def queue(self, index: int) -> DriverQueue:
        """The rings of a queue."""
        return self.queues[index]

    def send(
        self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False
    ) -> int:
        """Make a chain available; returns its head. The device does not hear of it yet."""
        return self.queues[index].offer(readable, writable, indirect=indirect)

    def kick(self, index: int) -> None:
        """Write QueueNotify, and let the device work until it has enough."""
        self.write(QUEUE_NOTIFY, index)
        self.work()

    def work(self) -> None:
        """Let the device work on every kick that came."""
        for _ in range(MOST_TURNS):
            if not self.kicks:
                return
            index = self.kicks.pop(0)
            if self.transport.kick(index):
                self.kicks.append(index)
        raise AssertionError("the device never has enough")

    def used(self, index: int) -> list[Used]:
        """What the device gave back on a queue since this was last asked."""
        return self.queues[index].take_used()

    def request(
        self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False
    ) -> bytes:
        """Send, kick, and return what was written. Raises AssertionError unless exactly that chain came back."""
        head = self.send(index, readable, writable, indirect=indirect)
        self.kick(index)
        used = self.used(index)
        assert [entry.head for entry in used] == [head], f"the device gave back {used}"
        return used[0].data

    def _count_interrupt(self) -> None:
        self.interrupts += 1
