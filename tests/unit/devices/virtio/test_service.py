"""How a device is served: kicks that are seen, chains that nobody kicks for, interrupts that are asked for."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.ids import STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, VIRTIO_F_VERSION_1
from asyncvmm.devices.virtio.registers import INTERRUPT_USED_BUFFER, QUEUE_NOTIFY, STATUS
from asyncvmm.testing import Driver
from tests.support.echo_device import UP, Echo


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_comes_back_with_its_answer_and_one_interrupt(event_idx: bool, indirect: bool) -> None:
    driver = Driver(Echo(), event_idx=event_idx, indirect=indirect)
    assert driver.request(0, [b"he", b"llo"], [3, 9], indirect=indirect) == b"HELLO"
    assert driver.interrupts == 1
    assert driver.acknowledge() == INTERRUPT_USED_BUFFER
    assert driver.acknowledge() == 0


def test_one_kick_serves_all_that_is_there() -> None:
    driver = Driver(Echo())
    heads = [driver.send(0, [bytes([65 + i])], [1]) for i in range(9)]
    driver.kick(0)
    assert [used.head for used in driver.used(0)] == heads


def test_a_ring_goes_round_many_times() -> None:
    driver = Driver(Echo(), queue_size=4, event_idx=True)
    for turn in range(70_000 // 64):
        assert driver.request(1, [b"%d" % turn], [8]) == b"%d" % turn


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    driver = Driver(Echo())
    driver.queue(0).set_avail_flags(1)
    driver.request(0, [b"x"], [1])
    assert driver.interrupts == 0


def test_with_event_indices_an_interrupt_comes_at_the_index_that_was_asked_for() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.queue(0).set_used_event(2)
    for expected in (0, 0, 1, 1):
        driver.send(0, [b"x"], [1])
        driver.kick(0)
        assert driver.interrupts == expected


def test_the_device_says_where_it_wants_to_be_kicked_next() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.request(0, [b"x"], [1])
    assert driver.queue(0).avail_event == 1


def test_a_chain_taken_without_a_kick_moves_the_place_of_the_next_kick() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    for expected in (1, 2):
        driver.send(0, [b"x"], [1])
        with device.session():
            device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
        assert driver.queue(0).avail_event == expected


def test_a_chain_that_comes_as_the_place_is_moved_is_served_all_the_same() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    driver.send(0, [b"x"], [1])
    fence, late = driver.view.fence, [b"late"]

    def come_late() -> None:
        if late:
            driver.send(0, [late.pop()], [4])
        fence()

    driver.view.fence = come_late
    with device.session():
        device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE"]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_comes_without_a_kick_after_the_devices_last_look_is_served_all_the_same(event_idx: bool) -> None:
    device = Echo()
    driver = Driver(device, event_idx=event_idx)
    work, late = device.process, [b"late", b"later"]

    def process(index: int) -> bool:
        more = work(index)
        if not more and late:
            driver.send(0, [late.pop(0)], [8])
        return more

    device.process = process  # type: ignore[method-assign]
    driver.send(0, [b"x"], [1])
    driver.kick(0)
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE", b"LATER"]


def test_a_chain_that_comes_between_the_last_pop_and_the_end_of_a_session_is_served_all_the_same() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    driver.send(0, [b"x"], [1])
    with device.session():
        device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
        assert device.queues[0].pop() is None
        driver.send(0, [b"late"], [4])
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE"]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_device_that_leaves_chains_where_they_are_is_not_asked_again_and_again(event_idx: bool) -> None:
    device = Echo()
    driver = Driver(device, event_idx=event_idx)
    asked: list[int] = []
    device.process = lambda index: bool(asked.append(index))  # type: ignore[method-assign,func-returns-value]
    driver.send(0, [b"x"], [1])
    driver.kick(0)
    assert asked == [0]


def test_a_chain_that_was_there_before_driver_ok_is_served_then() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, UP & ~STATUS_DRIVER_OK)
    driver.set_up_queues()
    driver.send(1, [b"early"], [5])
    driver.write(QUEUE_NOTIFY, 1)
    assert driver.kicks == []
    driver.write(STATUS, UP)
    driver.work()
    assert [used.data for used in driver.used(1)] == [b"EARLY"]
