"""A guest learns late that its packets were taken, if nothing else interrupts it; never does it learn too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asyncvmm.devices.virtio.vsock.device import PATIENCE_S, RX, TX, VirtioVsock
from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, HOST_CID, OP_CREDIT_UPDATE, OP_RST, OP_RW, Header
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.testing import Driver
from tests.support.vsock_guest import CID, header

SIZE = 64


class Clock:
    """What a device wanted to be called for later."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], object]]] = []

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        self.due.append((seconds, call))

    def strike(self) -> None:
        due, self.due = self.due, []
        for _, call in due:
            call()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(clock: Clock) -> Driver:
    device = VirtioVsock(CID, VsockMetrics())
    device.be_patient(clock.later)
    return Driver(device, queue_size=SIZE)


def send(driver: Driver, op: int = OP_RST, count: int = 1) -> None:
    """Packets for a connection that there is not: the device answers none but resets with a packet of its own."""
    for _ in range(count):
        driver.send(TX, readable=[header(op, 1, 2).encode()])
    driver.kick(TX)


def test_a_packet_taken_is_told_with_the_clock(driver: Driver, clock: Clock) -> None:
    send(driver)
    assert driver.interrupts == 0
    assert len(driver.used(TX)) == 1  # who looks finds it
    assert [seconds for seconds, _ in clock.due] == [PATIENCE_S]
    clock.strike()
    assert driver.interrupts == 1
    clock.strike()
    assert driver.interrupts == 1


def test_there_is_one_clock_for_many_packets(driver: Driver, clock: Clock) -> None:
    send(driver)
    send(driver)
    assert len(clock.due) == 1
    clock.strike()
    assert driver.interrupts == 1
    send(driver)
    clock.strike()
    assert driver.interrupts == 2


def test_an_answer_tells_of_the_packet_too(driver: Driver, clock: Clock) -> None:
    driver.send(RX, writable=[HEADER_SIZE, SIZE])
    driver.kick(RX)
    before = driver.interrupts
    send(driver, OP_RW)
    assert Header.decode(driver.used(RX)[0].data).src_cid == HOST_CID
    assert driver.interrupts == before + 1
    clock.strike()
    assert driver.interrupts == before + 1


def test_more_than_an_eighth_of_the_queue_is_told_at_once(driver: Driver, clock: Clock) -> None:
    send(driver, count=SIZE // 8)
    assert driver.interrupts == 0
    send(driver)
    assert driver.interrupts == 1
    clock.strike()
    assert driver.interrupts == 1


def test_a_driver_of_few_descriptors_is_told_at_once(clock: Clock) -> None:
    device = VirtioVsock(CID, VsockMetrics())
    device.be_patient(clock.later)
    driver = Driver(device, queue_size=4)
    send(driver)
    assert driver.interrupts == 1


def test_a_clock_behind_the_driver_s_end_does_nothing(driver: Driver, clock: Clock) -> None:
    send(driver)
    driver.reset()
    clock.strike()
    assert driver.interrupts == 0
    driver.start()
    send(driver)
    clock.strike()
    assert driver.interrupts == 1


def test_a_device_held_meanwhile_tells_when_it_works_again(driver: Driver, clock: Clock) -> None:
    send(driver)
    driver.transport.held = True
    clock.strike()
    assert driver.interrupts == 0
    driver.transport.held = False
    driver.transport.kick(TX)
    clock.strike()
    assert driver.interrupts == 1


def test_without_a_clock_every_packet_is_told_at_once() -> None:
    driver = Driver(VirtioVsock(CID, VsockMetrics()), queue_size=SIZE)
    send(driver, OP_CREDIT_UPDATE)
    assert driver.interrupts == 1
