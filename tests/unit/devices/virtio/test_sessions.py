"""Sessions with a device: what they leave behind, also those within another and those that fail."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.testing import Driver
from tests.support.endless import EndlessDevice


@pytest.fixture
def driver() -> Driver:
    return Driver(EndlessDevice(1), event_idx=True)


def give_back(driver: Driver) -> None:
    chain = driver.device.queues[0].pop()
    assert chain is not None
    driver.device.queues[0].push(chain, 0)


def test_a_session_without_work_interrupts_nobody(driver: Driver) -> None:
    with driver.device.session() as alive:
        assert alive
    assert driver.interrupts == 0


def test_one_interrupt_tells_of_all_of_a_session_and_the_next_kick_is_asked_for(driver: Driver) -> None:
    for _ in range(3):
        driver.send(0, writable=[8])
    with driver.device.session():
        give_back(driver)
        give_back(driver)
    assert driver.interrupts == 1
    assert len(driver.used(0)) == 2
    assert driver.queue(0).avail_event == 2
    with driver.device.session():
        pass
    assert driver.interrupts == 1


def test_a_guest_s_fault_leaves_neither_session_nor_the_one_around_it(driver: Driver) -> None:
    with driver.device.session() as alive:
        assert alive
        with driver.device.session():
            raise GuestFault("first")
        assert not driver.device.running
        raise GuestFault("second")
    assert driver.needs_reset
    assert driver.faults == ["first"]


def test_a_fault_of_ours_does_leave_it_and_what_was_given_back_is_told(driver: Driver) -> None:
    driver.send(0, writable=[8])

    def fail() -> None:
        with driver.device.session():
            give_back(driver)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert driver.interrupts == 1
    with driver.device.session() as alive:
        assert alive
