"""A virtio device's place on the loop: its kicks are real eventfds, its driver a few register writes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.registers import DRIVER_FEATURES, DRIVER_FEATURES_SEL, PAGE_BYTES, QUEUE_NOTIFY, STATUS
from asyncvmm.errors import HostError
from asyncvmm.machine.kvm.virtio import VirtioSlot
from tests.support.endless import EndlessDevice

pytestmark = pytest.mark.anyio


def new_slot(device: VirtioDevice) -> VirtioSlot:
    ram, page = bytearray(4096), bytearray(PAGE_BYTES)
    return VirtioSlot(0, device, GuestView([(0, memoryview(ram))]), memoryview(page), "endless")


@pytest.fixture
async def slot(anyio_backend: object) -> AsyncIterator[VirtioSlot]:
    slot = new_slot(EndlessDevice(1))
    errors: list[Exception] = []
    slot.watch(asyncio.get_running_loop(), errors.append)
    start(slot)
    yield slot
    slot.close()
    assert not errors


def start(slot: VirtioSlot) -> None:
    """What a driver does until DRIVER_OK."""
    known = STATUS_ACKNOWLEDGE | STATUS_DRIVER
    for register, value in (
        (STATUS, known),
        (DRIVER_FEATURES_SEL, 1),
        (DRIVER_FEATURES, 1 << VIRTIO_F_VERSION_1 - 32),
        (STATUS, known | STATUS_FEATURES_OK),
        (STATUS, known | STATUS_FEATURES_OK | STATUS_DRIVER_OK),
    ):
        slot.transport.write(register, value, 4)
    assert slot.transport.running


async def test_a_guest_that_kicks_again_and_again_gets_one_turn_at_a_time(slot: VirtioSlot) -> None:
    assert isinstance(slot.device, EndlessDevice)
    assert 0 < await slot.device.calls_a_turn(lambda: slot.transport.write(QUEUE_NOTIFY, 0, 4)) <= 1.5


async def test_a_kick_that_the_loop_cannot_watch_is_an_error_in_kind_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    slot = new_slot(EndlessDevice(2))
    _, second = slot._kick_fds
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, second, inheritable=False)  # epoll refuses files, as it does anything once it watches too much
    os.close(file)
    with pytest.raises(HostError, match="expected a loop that can watch its 2 kicks, found Operation not permitted"):
        slot.watch(asyncio.get_running_loop(), lambda error: None)
    slot.close()
    assert len(os.listdir("/proc/self/fd")) == before
