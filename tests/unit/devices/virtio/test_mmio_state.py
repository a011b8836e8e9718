"""The transport's state: restored with what waited, and refused where no device can have it."""

from __future__ import annotations

import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.testing import Driver
from tests.support.echo_device import Echo


def test_a_device_restored_from_its_state_goes_on_where_it_was() -> None:
    driver = Driver(Echo(), event_idx=True)
    for _ in range(5):
        driver.request(0, [b"before"], [6])
    state = driver.transport.state()
    device = Echo()
    transport = driver.new_transport(device)
    transport.restore(state)
    driver.transport = transport
    assert transport.state() == state
    assert driver.request(0, [b"after"], [6]) == b"AFTER"


def test_a_restored_device_serves_what_waited_for_it() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.send(0, [b"waiting"], [7])
    state = driver.transport.state()
    driver.transport = driver.new_transport(Echo())
    driver.transport.restore(state)
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"WAITING"]


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": 1},
        {"acked": 1 << 63},
        {"status": -1},
        {"queues": []},
        {"queues": None},
        {"config": "00"},
        {"config": "zz"},
        {"interrupt_status": 4},
        {"wanted": None},
        {"queue_sel": "1"},
    ],
)
def test_a_state_that_no_device_can_have_is_refused(change: dict[str, object]) -> None:
    driver = Driver(Echo())
    with pytest.raises(ConfigError):
        driver.new_transport(Echo()).restore({**driver.transport.state(), **change})


@pytest.mark.parametrize(
    ("field", "value"), [("size", 3), ("descriptors", 1 << 40), ("next_avail", 65536), ("size", 0)]
)
def test_a_saved_queue_that_cannot_be_is_refused(field: str, value: int) -> None:
    driver = Driver(Echo())
    state = driver.transport.state()
    state["queues"][0][field] = value
    with pytest.raises(ConfigError):
        driver.new_transport(Echo()).restore(state)
