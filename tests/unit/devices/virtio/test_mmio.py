"""The virtio-mmio transport: status machine, features, queues, resets and configuration, as a driver meets them."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.ids import (
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    CONFIG_GENERATION,
    DEVICE_ID,
    INTERRUPT_CONFIG_CHANGE,
    INTERRUPT_STATUS,
    MAGIC_VALUE,
    QUEUE_DESC_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    SHM_LEN_LOW,
    STATUS,
)
from asyncvmm.testing import Driver
from tests.support.echo_device import Echo


def test_the_registers_say_what_the_device_is() -> None:
    driver = Driver(Echo(), start=False)
    assert driver.read(MAGIC_VALUE).to_bytes(4, "little") == b"virt"
    assert (driver.read(4), driver.read(DEVICE_ID), driver.read(SHM_LEN_LOW)) == (2, 42, 0xFFFFFFFF)
    assert driver.offered() == 0b1010 | 1 << 28 | 1 << 29 | 1 << 32
    assert driver.config(0, 4) == b"\x01\x02\x03\x04"


def test_features_that_were_not_offered_are_refused() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1 | 0b0100)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    assert not driver.status & STATUS_FEATURES_OK


def test_a_driver_without_version_1_is_refused() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(0b1010)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    assert not driver.status & STATUS_FEATURES_OK


@pytest.mark.parametrize(
    ("writes", "status"),
    [
        ([STATUS_ACKNOWLEDGE, STATUS_DRIVER_OK | STATUS_ACKNOWLEDGE], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE, STATUS_DRIVER], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE | 16], 0),
        ([STATUS_ACKNOWLEDGE | 64], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE, STATUS_ACKNOWLEDGE | STATUS_FAILED], STATUS_ACKNOWLEDGE | STATUS_FAILED),
        ([STATUS_ACKNOWLEDGE | STATUS_DRIVER, 0], 0),
    ],
)
def test_a_status_that_cannot_follow_is_ignored(writes: list[int], status: int) -> None:
    driver = Driver(Echo(), start=False)
    for value in writes:
        driver.write(STATUS, value)
    assert driver.status == status


def test_a_reset_gives_the_memory_back_at_once() -> None:
    device = Echo()
    driver = Driver(device)
    device.holding = True
    driver.send(0, [b"late"], [4])
    driver.kick(0)
    driver.reset()
    before = bytes(driver.memory)
    with device.session() as running:
        assert not running
        device.finish(0, device.held[0])
    assert bytes(driver.memory) == before


def test_a_queue_that_is_stopped_forgets_its_chains() -> None:
    device = Echo()
    driver = Driver(device)
    device.holding = True
    driver.send(0, [b"late"], [4])
    driver.kick(0)
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_READY, 0)
    before = bytes(driver.memory)
    with device.session():
        device.finish(0, device.held[0])
    assert bytes(driver.memory) == before
    assert driver.read(QUEUE_READY) == 0


def test_a_device_can_be_started_again_after_a_reset() -> None:
    driver = Driver(Echo())
    driver.reset()
    driver.start()
    assert driver.request(0, [b"again"], [5]) == b"AGAIN"


@pytest.mark.parametrize("size", [0, 3, 128, 1 << 31])
def test_a_queue_of_an_impossible_size_asks_for_a_reset(size: int) -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_NUM, size)
    driver.write(QUEUE_READY, 1)
    assert (driver.read(QUEUE_READY), driver.needs_reset) == (0, True)


@pytest.mark.parametrize("address", [1, 0xFFFFFFF0, (1 << 64) - 16, 1 << 20])
def test_a_queue_outside_of_memory_or_askew_asks_for_a_reset(address: int) -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    driver.write(QUEUE_NUM, 4)
    driver.write(QUEUE_DESC_LOW, address & 0xFFFFFFFF)
    driver.write(QUEUE_DESC_LOW + 4, address >> 32)
    driver.write(QUEUE_READY, 1)
    assert (driver.read(QUEUE_READY), driver.needs_reset) == (0, True)


def test_queues_cannot_be_set_up_before_features_are_settled_or_while_they_are_used() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_NUM, 8)
    assert driver.device.queues[0].size == 0
    driver.start()
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_NUM, 8)
    driver.write(QUEUE_DESC_LOW, 0x5000)
    assert (driver.device.queues[0].size, driver.device.queues[0].descriptors) == (64, 0)


def test_a_queue_that_is_not_there_has_no_size() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_SEL, 2)
    assert (driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)) == (0, 0)
    driver.write(QUEUE_SEL, 0xFFFFFFFF)
    driver.write(QUEUE_READY, 1)
    assert driver.read(QUEUE_NUM_MAX) == 0


def test_kicks_of_queues_that_are_not_there_or_too_early_are_ignored() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_NOTIFY, 0)
    driver.start()
    driver.write(QUEUE_NOTIFY, 2)
    assert driver.kicks == []


@pytest.mark.parametrize(("offset", "size"), [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0, 4), (0x74, 4)])
def test_a_write_that_is_no_word_to_a_register_is_ignored(offset: int, size: int) -> None:
    driver = Driver(Echo())
    page = bytes(driver.read(i, 1) for i in range(0x200))
    driver.write(offset, 0, size)
    assert bytes(driver.read(i, 1) for i in range(0x200)) == page


def test_a_write_beyond_the_configuration_space_is_counted_and_ignored() -> None:
    driver = Driver(Echo())
    page = bytes(driver.read(i, 1) for i in range(0x1000))
    driver.write(0x102, 0, 4)
    driver.write(0xFF8, 0, 8)
    assert bytes(driver.read(i, 1) for i in range(0x1000)) == page
    assert driver.device.metrics.cfg_fails == 2


def test_a_changed_configuration_is_shown_and_announced() -> None:
    driver = Driver(Echo())
    before = driver.read(CONFIG_GENERATION)
    driver.device.config[:] = b"WXYZ"
    driver.device.config_changed()
    assert driver.config(0, 4) == b"WXYZ"
    assert driver.read(CONFIG_GENERATION) != before
    assert driver.read(INTERRUPT_STATUS) == INTERRUPT_CONFIG_CHANGE
    assert driver.interrupts == 1


def test_a_change_before_the_driver_is_there_interrupts_nobody() -> None:
    driver = Driver(Echo(), start=False)
    driver.device.config_changed()
    assert (driver.interrupts, driver.read(INTERRUPT_STATUS)) == (0, 0)


def test_a_device_that_refuses_to_start_asks_for_a_reset() -> None:
    device = Echo()
    device.refuse = True
    driver = Driver(device)
    assert driver.needs_reset
    assert device.metrics.activate_fails == 1


def test_after_a_fault_nothing_is_served_until_the_reset() -> None:
    driver = Driver(Echo())
    driver.queue(0).put_available(64)
    driver.kick(0)
    assert driver.needs_reset
    assert driver.read(INTERRUPT_STATUS) & INTERRUPT_CONFIG_CHANGE
    driver.send(1, [b"x"], [1])
    driver.kick(1)
    assert driver.used(1) == []
    driver.reset()
    driver.start()
    assert driver.request(1, [b"x"], [1]) == b"X"


def test_what_a_driver_writes_to_the_configuration_it_reads_there() -> None:
    class Writable(Echo):
        def write_config(self, offset: int, data: bytes) -> None:
            self.config[offset : offset + len(data)] = data

    driver = Driver(Writable())
    driver.write(CONFIG + 1, 0xAB, 1)
    assert driver.config(0, 4) == b"\x01\xab\x03\x04"
    assert driver.interrupts == 0
