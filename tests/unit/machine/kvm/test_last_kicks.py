"""What a guest left in its queues when it ended: an orderly one's is served, a hostile one's does not hold us up."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator

import pytest

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console.device import DATA_QUEUE_SIZE, VirtioConsole
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.mmio import VirtioMmio
from asyncvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, MOST_DESCRIPTORS
from asyncvmm.devices.virtio.registers import PAGE_BYTES
from asyncvmm.machine.kvm.virtio import LAST_DESCRIPTORS, LAST_TURNS, VirtioSlot
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.testing import Driver
from tests.support.endless import EndlessDevice

RAM = 1 << 20
PORTS = 7


class SlotDriver(Driver):
    """A driver behind the registers of a slot, whose kicks nobody hears."""

    slot: VirtioSlot

    def new_transport(self, device: VirtioDevice) -> VirtioMmio:
        self.slot = VirtioSlot(0, device, self.view, memoryview(bytearray(PAGE_BYTES)), "test", vm="a1b2")
        return self.slot.transport


@pytest.fixture
def console() -> Iterator[SlotDriver]:
    device = VirtioConsole(ConsoleConfig(ports=tuple(f"port{number}" for number in range(PORTS))), ConsoleMetrics())
    driver = SlotDriver(device, memory_size=RAM, queue_size=DATA_QUEUE_SIZE // 4, indirect=True)
    yield driver
    driver.slot.close()


def test_all_of_a_full_ring_is_served() -> None:
    device = VirtioConsole(ConsoleConfig(), ConsoleMetrics())
    driver = SlotDriver(device, queue_size=DATA_QUEUE_SIZE)
    for number in range(DATA_QUEUE_SIZE):
        driver.send(1, [b"%04d" % number])
    driver.slot.work_off()
    assert len(driver.used(1)) == DATA_QUEUE_SIZE
    assert device.ports[0].take(1 << 20).endswith(b"0127")
    driver.slot.close()


def test_queues_without_an_end_get_a_few_turns_each() -> None:
    device = EndlessDevice(3)
    driver = SlotDriver(device)
    driver.slot.work_off()
    assert device.calls == 3 * LAST_TURNS
    driver.slot.close()


def test_chains_longer_than_a_driver_makes_them_are_left_lying(console: SlotDriver) -> None:
    for index in range(5, 2 * PORTS + 4, 2):
        offer_long_chains(console, index)
    console.slot.work_off()
    walked = sum(queue.walked for queue in console.device.queues)
    assert LAST_DESCRIPTORS <= walked < LAST_DESCRIPTORS + 2 * MOST_DESCRIPTORS


def test_a_driver_that_asks_for_the_impossible_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    driver = SlotDriver(VirtioConsole(ConsoleConfig(), ConsoleMetrics()))
    for _ in range(3):
        driver.queue(1).set_avail_index(0x8000)
        driver.slot.work_off()
        assert driver.needs_reset
        driver.reset()
        driver.start()
    assert "test of a1b2" in caplog.messages[0]
    assert "ahead" in caplog.messages[0]
    assert len(caplog.messages) == 3
    driver.slot.close()


def offer_long_chains(driver: SlotDriver, index: int) -> None:
    """Fill a ring with the longest chains there may be, all of the same buffers."""
    queue, table = driver.queue(index), RAM - 16 * MOST_DESCRIPTORS
    for place in range(MOST_DESCRIPTORS):
        flags = DESC_F_NEXT * (place < MOST_DESCRIPTORS - 1)
        struct.pack_into("<QIHH", driver.memory, table + 16 * place, table - 64, 1, flags, place + 1)
    queue.set_descriptor(0, table, 16 * MOST_DESCRIPTORS, DESC_F_INDIRECT, 0)
    for _ in range(queue.size):
        queue.put_available(0)


@pytest.mark.anyio
async def test_a_device_that_goes_wrong_at_the_end_is_told_of_and_keeps_nobody() -> None:
    class Wrong(EndlessDevice):
        def process(self, index: int) -> bool:
            raise RuntimeError("wrong")

    driver, errors = SlotDriver(Wrong(1)), list[Exception]()
    driver.slot.watch(asyncio.get_running_loop(), errors.append)
    driver.slot.work_off()
    assert [str(error) for error in errors] == ["wrong"]
    driver.slot.close()
