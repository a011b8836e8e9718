"""Devices that are held: nothing moves meanwhile, and what was due comes afterwards."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.vsock.device import EVENT
from asyncvmm.errors import SnapshotFailed
from tests.support.device_rig import Rig, until
from tests.support.disk_writer import Writer

pytestmark = pytest.mark.anyio


async def test_nothing_in_guest_memory_moves_while_the_devices_are_held(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(20)
        await checkpoint()
        for name in ("rng", "console"):
            rig.drivers[name].send(0, [], [512])
        await rig.devices.hold()
        before = bytes(rig.memory.view)
        for driver in rig.drivers.values():
            for index in range(len(driver.queues)):
                driver.ring(index)
        assert rig.devices.vsock is not None
        assert rig.devices.balloon is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.devices.ports["console"].send, b"to the guest")
            tasks.start_soon(swallow, rig.devices.vsock.connect, 7)
            await anyio.sleep(0.05)
            # A register write changes rings of flags; nobody has made any.
            assert bytes(rig.memory.view) == before
            rig.devices.unhold()
            await until(lambda: rig.drivers["console"].queue(0).used_index == 1)
            assert rig.drivers["console"].used(0)[0].data == b"to the guest"
            tasks.cancel_scope.cancel()
        await until(lambda: rig.drivers["rng"].queue(0).used_index == 1)
        await writer.finish()


async def swallow(function: Any, *arguments: Any) -> None:
    try:
        await function(*arguments)
    except Exception:
        return


async def test_an_interrupt_that_was_due_while_held_comes_afterwards(config: DeviceConfig) -> None:
    async with Rig(config) as rig:
        slot = next(slot for slot in rig.devices.slots if slot.name == "balloon")
        await rig.devices.hold()
        interrupts = eventfd_of(slot)
        slot.device.config_changed()
        assert drained(interrupts) == 0
        assert rig.drivers["balloon"].acknowledge() & 2
        rig.devices.unhold()
        assert drained(interrupts) == 1


async def test_a_restored_device_interrupts_once_for_what_was_on_its_way(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [0] * 5
            again.devices.unhold()
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [1] * 5
            await again.devices.hold()
            again.devices.unhold()
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [0] * 5


def eventfd_of(slot: Any) -> int:
    fd: int = slot._interrupt_fd
    return fd


def drained(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def test_a_restored_guest_hears_that_its_connections_are_gone(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        rig.drivers["vsock"].send(EVENT, [], [8])
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            again.devices.unhold()
            await until(lambda: again.drivers["vsock"].queue(EVENT).used_index == 1)
            assert again.drivers["vsock"].used(EVENT)[0].data == bytes(4)
        rig.devices.unhold()
        await anyio.sleep(0.01)
        assert not rig.drivers["vsock"].used(EVENT)


async def test_a_restored_balloon_is_as_large_as_it_was(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        driver = rig.drivers["balloon"]
        driver.write(0x104, 5 * 256)
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            assert again.drivers["balloon"].config(0, 8) == struct.pack("<II", 7 * 256, 5 * 256)


async def test_a_disk_that_hangs_keeps_nobody_from_pausing_but_is_not_saved(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("asyncvmm.machine.kvm.devices.HOLD_TIMEOUT_S", 0.05)
    async with Rig(config) as rig:
        (drive,) = rig.devices._drives
        write = drive.disk._image.write
        monkeypatch.setattr(drive.disk._image, "write", lambda *a, **k: (gate.wait(), write(*a, **k)))
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(3)
        await until(lambda: not drive.device.drain())
        with pytest.raises(SnapshotFailed, match="idle disks"):
            await rig.save(tmp_path / "saved")
        before = bytes(rig.memory.view)
        gate.set()
        await anyio.sleep(0.05)
        assert bytes(rig.memory.view) == before
        rig.devices.unhold()
        await writer.finish()


async def test_a_pause_that_is_cancelled_leaves_the_devices_at_work(
    config: DeviceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    async with Rig(config) as rig:
        (drive,) = rig.devices._drives
        write = drive.disk._image.write
        monkeypatch.setattr(drive.disk._image, "write", lambda *a, **k: (gate.wait(), write(*a, **k)))
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(3)
        await until(lambda: not drive.device.drain())
        with anyio.move_on_after(0.02) as scope:
            await rig.devices.hold()
        assert scope.cancelled_caught
        gate.set()
        writer.submit(3)
        await writer.finish()
