"""A DeviceSet without a VM: its guest is plain memory, with a driver for each device on the test's side.

A rig can be copied the way a snapshot is: memory, the devices' states, drives, and what the drivers know.
"""

from __future__ import annotations

import copy
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import anyio
import attrs

from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.registers import (
    QUEUE_DESC_LOW,
    QUEUE_DEVICE_LOW,
    QUEUE_DRIVER_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
)
from asyncvmm.machine.base import BootPlan, Resources
from asyncvmm.machine.kvm.devices import DeviceSet
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.virtio import VirtioSlot
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.resources import HostResources, SavedResources
from asyncvmm.snapshot.codec import encode
from asyncvmm.storage.snapshot import save_drives
from asyncvmm.testing import Driver, DriverQueue
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.layout import MMIO_SIZE, Region

SHARE = 1 << 20
"""Bytes of guest RAM that each device's driver has."""

MOST_DEVICES = 5

PATIENCE_S = 20


class SlotDriver(Driver):
    """The driver of a device at its place, in a part of guest RAM: kicks are eventfds, and the loop serves them."""

    def __init__(self, slot: VirtioSlot, ram: memoryview, base: int, *, event_idx: bool) -> None:
        super().__init__(slot.device, memory_size=0, event_idx=event_idx, start=False)
        self._base = base
        self.memory = cast(bytearray, ram)
        self._take(slot)

    def _take(self, slot: VirtioSlot) -> None:
        slot.device.transport = slot.transport
        self.device, self.transport = slot.device, slot.transport

    def moved(self, slot: VirtioSlot, ram: memoryview) -> SlotDriver:
        """The same driver, in a copy of its guest."""
        twin = copy.copy(self)
        twin.memory = cast(bytearray, ram)
        twin.queues = copy.deepcopy(self.queues, {id(self.memory): ram})
        twin._take(slot)
        return twin

    def _set_up(self, index: int, share: int) -> DriverQueue:
        self.write(QUEUE_SEL, index)
        size, part = min(self.read(QUEUE_NUM_MAX), 64), SHARE // len(self.device.queues) & ~15
        base = self._base + index * part
        queue = DriverQueue(self.memory, base, base + part, size, event_idx=self._event_idx)
        self.write(QUEUE_NUM, size)
        for register, address in (
            (QUEUE_DESC_LOW, queue.descriptors),
            (QUEUE_DRIVER_LOW, queue.driver_area),
            (QUEUE_DEVICE_LOW, queue.device_area),
        ):
            self.write(register, address)
        self.write(QUEUE_READY, 1)
        return queue

    def ring(self, index: int) -> None:
        """Kick; the loop has its turn later."""
        self.write(QUEUE_NOTIFY, index)


@attrs.frozen
class _Ram:
    """As much of a KvmVm as its devices look at."""

    memory: GuestMemory
    registers: memoryview


@attrs.define
class Folder:
    """A snapshot's directory, as far as drives know it."""

    path: Path

    def __attrs_post_init__(self) -> None:
        (self.path / "disks").mkdir(parents=True)

    def create(self, name: str) -> int:
        """See NewFiles."""
        return os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)

    def open_file(self, name: str) -> int:
        """See SavedResources."""
        return os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)


@attrs.frozen
class Saved:
    """A rig as it stood."""

    ram: bytes
    section: bytes
    drives: list[dict[str, object]]
    folder: Folder


class Rig:
    """Devices and drivers; ``drivers`` by the devices' names, each started unless ``of`` says what to become."""

    def __init__(self, devices: DeviceConfig, *, event_idx: bool = False, of: tuple[Rig, Saved] | None = None) -> None:
        self.config = devices
        self.errors: list[Exception] = []
        self.drivers: dict[str, SlotDriver] = {}
        self.resources = HostResources()
        self._event_idx = event_idx
        self._of = of

    async def __aenter__(self) -> Self:
        saved = self._of[1] if self._of is not None else None
        again = None if saved is None else SavedResources(drives=saved.drives, open_file=saved.folder.open_file)
        await self.resources.make_ready(self.config, "kvm", Timeline(), again)
        self._mapping = mmap.mmap(-1, MOST_DEVICES * SHARE)
        if saved is not None:
            self._mapping[:] = saved.ram
        address = Pinned(memoryview(self._mapping)).address
        self.memory = GuestMemory([Region(0, len(self._mapping))], address)
        registers = memoryview(bytearray(MMIO_SIZE * self.config.count))
        plan = BootPlan(
            name="rig",
            memory_mib=64,
            vcpus=1,
            kernel=Path("/"),
            initrd=None,
            devices=self.config,
            resources=self.resources.record,
        )
        self.devices = DeviceSet(plan, VmMetrics())
        try:
            await self.devices.open()
            ram = cast(KvmVm, _Ram(self.memory, registers))
            self.devices.fit(ram, self.errors.append, None if saved is None else saved.section)
            self._drive()
        except BaseException:
            await self._close()
            raise
        return self

    def _drive(self) -> None:
        ram = self.memory.view
        for index, slot in enumerate(self.devices.slots):
            if self._of is not None:
                self.drivers[slot.name] = self._of[0].drivers[slot.name].moved(slot, ram)
            else:
                driver = SlotDriver(slot, ram, index * SHARE, event_idx=self._event_idx)
                driver.start()
                self.drivers[slot.name] = driver

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()
        assert not self.errors

    async def _close(self) -> None:
        for driver in self.drivers.values():
            driver.memory = bytearray()
            driver.queues = []
        await self.devices.aclose()
        self.memory.close()
        await self.resources.aclose()

    async def save(self, place: Path) -> Saved:
        """As a machine that is paused is saved; the devices are held from then on."""
        await self.devices.hold()
        section = encode(await self.devices.state())
        folder = Folder(place)
        drives = await save_drives(Resources(drives=self.resources.record.drives), folder)
        return Saved(bytes(self.memory.view), section, drives, folder)

    def restored(self, saved: Saved) -> Rig:
        """Another one, which is this one as it was saved; its devices are held."""
        return Rig(self.config, event_idx=self._event_idx, of=(self, saved))


async def until(condition: object) -> None:
    """Return once ``condition()`` is true."""
    assert callable(condition)
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (what is waited for is memory)
            await anyio.sleep(0.0005)
