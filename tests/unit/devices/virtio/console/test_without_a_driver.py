"""What a port's user on the host does while there is no driver, or one that has broken its rings."""

from __future__ import annotations

import pytest

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console.control import DEVICE_READY, PORT_OPEN, PORT_READY, RESIZE, Control
from asyncvmm.devices.virtio.console.device import (
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    MOST_CONTROL,
    VirtioConsole,
)
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.testing import Driver

DATA_TRANSMIT = 5


def driver(*names: str) -> Driver:
    return Driver(VirtioConsole(ConsoleConfig(ports=names), ConsoleMetrics(), backlog_bytes=8))


def open_and_close(guest: Driver, number: int) -> None:
    device = guest.device
    assert isinstance(device, VirtioConsole)
    port = device.ports[number]
    with device.session():
        device.open_port(port)
    with device.session():
        device.close_port(port)


def say(guest: Driver, *messages: Control) -> None:
    for message in messages:
        guest.send(CONTROL_TRANSMIT, [message.to_bytes()])
    guest.kick(CONTROL_TRANSMIT)


def test_the_only_port_of_a_console_can_be_opened_and_closed() -> None:
    guest = driver()
    open_and_close(guest, 0)
    guest.reset()
    open_and_close(guest, 0)


@pytest.mark.parametrize("queue", [CONTROL_RECEIVE, DATA_TRANSMIT])
def test_a_driver_with_broken_rings_is_no_trouble_for_who_opens_or_closes_a_port(queue: int) -> None:
    guest = driver("data")
    device = guest.device
    assert isinstance(device, VirtioConsole)
    with device.session():
        device.open_port(device.ports[1])
    say(guest, Control(0, DEVICE_READY, 1), Control(1, PORT_READY, 1), Control(1, PORT_OPEN, 1))
    for _ in range(3):
        guest.send(DATA_TRANSMIT, [b"12345678"])
    guest.kick(DATA_TRANSMIT)
    assert device.ports[1].throttled
    guest.queue(queue).set_avail_index(0x8000)
    guest.queue(0).set_avail_index(0x8000)
    with device.session():
        device.queues[0].pop()
    assert guest.needs_reset
    memory = bytes(guest.memory)
    open_and_close(guest, 1)
    assert guest.memory == memory


def test_a_window_that_changes_its_size_all_the_time_fills_no_memory() -> None:
    guest = driver("data")
    device = guest.device
    assert isinstance(device, VirtioConsole)
    say(guest, Control(0, PORT_READY, 1))
    for width in range(10 * MOST_CONTROL):
        with device.session():
            device.resize(width, 25)
    assert len(device.state()["messages"]) < MOST_CONTROL
    for _ in range(8):
        guest.send(CONTROL_RECEIVE, writable=[64])
    guest.kick(CONTROL_RECEIVE)
    sizes = [used.data for used in guest.used(CONTROL_RECEIVE) if Control.parse(used.data).event == RESIZE]
    assert [int.from_bytes(data[8:10], "little") for data in sizes] == [10 * MOST_CONTROL - 1]
