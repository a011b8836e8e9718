"""Control messages between the console and its driver: ports added, named, opened, closed, sized."""

from __future__ import annotations

import struct

import pytest

from asyncvmm.devices.virtio.console.control import (
    CONSOLE_PORT,
    DEVICE_READY,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    Control,
)
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, MAX_NR_PORTS, MOST_CONTROL
from asyncvmm.testing.driver import Driver
from tests.support.console_guest import DATA_TRANSMIT, Linux, console, up


def test_a_driver_is_told_of_every_port() -> None:
    driver = Linux(console())
    assert driver.config(MAX_NR_PORTS, 4) == struct.pack("<I", 3)
    driver.tell(0, DEVICE_READY)
    assert driver.heard() == [Control(port, PORT_ADD) for port in range(3)]
    driver.tell(0, PORT_READY)
    assert driver.heard() == [Control(0, CONSOLE_PORT, 1), Control(0, PORT_OPEN, 1)]
    driver.tell(1, PORT_READY)
    assert driver.heard() == [Control(1, PORT_NAME, 1, b"data")]


def test_both_sides_hear_when_the_other_opens_and_closes() -> None:
    device = console()
    driver, port = up(device), device.ports[1]
    assert port.guest_open
    with device.session():
        device.open_port(port)
    assert driver.heard() == [Control(1, PORT_OPEN, 1)]
    with device.session():
        device.close_port(port)
    assert driver.heard() == [Control(1, PORT_OPEN, 0)]
    driver.tell(1, PORT_OPEN, 0)
    assert not port.guest_open
    assert (device.metrics.ports_opened, device.metrics.ports_closed) == (3, 1)


def test_a_port_that_is_open_already_is_introduced_as_such() -> None:
    device = console()
    driver = Linux(device, start=False)
    with device.session():
        device.open_port(device.ports[2])
    driver.start()
    driver.listen(4)
    driver.tell(2, PORT_READY)
    assert driver.heard() == [Control(2, PORT_NAME, 1, b"more"), Control(2, PORT_OPEN, 1)]


def test_of_openings_and_closings_nobody_heard_the_newest_counts() -> None:
    device = console()
    driver = Linux(device, buffers=1)
    driver.tell(1, PORT_READY)
    for _ in range(100):
        with device.session():
            device.open_port(device.ports[1])
            device.close_port(device.ports[1])
    assert driver.heard() == [Control(1, PORT_NAME, 1, b"data")]
    assert driver.heard() == [Control(1, PORT_OPEN, 0)]


def test_hvc0_is_told_its_size() -> None:
    device = console()
    driver = up(device)
    with device.session():
        device.resize(80, 25)
    assert driver.heard() == [Control(0, RESIZE, 0, struct.pack("<HH", 80, 25))]


@pytest.mark.parametrize(
    "message",
    [
        b"\0",
        bytes(7),
        struct.pack("<IHH", 3, PORT_OPEN, 1),
        struct.pack("<IHH", 0xFFFFFFFF, PORT_READY, 1),
        struct.pack("<IHH", 0, 99, 1),
        struct.pack("<IHH", 0, PORT_ADD, 1),
        struct.pack("<IHH", 0, DEVICE_READY, 0),
        struct.pack("<IHH", 0, PORT_READY, 0),
    ],
)
def test_a_malformed_control_message_is_counted_and_ignored(message: bytes) -> None:
    device = console()
    driver = Linux(device)
    driver.request(CONTROL_TRANSMIT, [message])
    assert driver.heard() == []
    assert (device.metrics.control_fails, device.metrics.control_count) == (1, 0)


def test_a_driver_that_talks_and_does_not_listen_has_to_wait() -> None:
    device = console()
    driver = Linux(device, buffers=0)
    sent = 0
    while sent < 10 * MOST_CONTROL:
        driver.send(CONTROL_TRANSMIT, [struct.pack("<IHH", 0, DEVICE_READY, 1)])
        driver.kick(CONTROL_TRANSMIT)
        if not driver.used(CONTROL_TRANSMIT):
            break
        sent += 1
    assert sent <= MOST_CONTROL
    heard = 0
    for _ in range(sent):
        driver.send(CONTROL_RECEIVE, writable=[64])
        driver.send(CONTROL_RECEIVE, writable=[64])
        driver.send(CONTROL_RECEIVE, writable=[64])
        driver.kick(CONTROL_RECEIVE)
        heard += len(driver.used(CONTROL_RECEIVE))
    assert heard == 3 * sent
    assert len(driver.used(CONTROL_TRANSMIT)) == 1, "the one that waited"


def test_a_buffer_too_small_for_a_message_is_returned_and_counted() -> None:
    device = console()
    driver = Linux(device, buffers=0)
    driver.send(CONTROL_RECEIVE, writable=[4])
    driver.send(CONTROL_RECEIVE, [b"not to be written"])
    driver.send(CONTROL_RECEIVE, writable=[8])
    driver.tell(1, PORT_READY)
    assert [used.written for used in driver.used(CONTROL_RECEIVE)] == [0, 0, 0]
    assert device.metrics.control_fails == 3
    driver.send(CONTROL_RECEIVE, writable=[12])
    driver.kick(CONTROL_RECEIVE)
    assert driver.used(CONTROL_RECEIVE)[0].data[8:] == b"data"


def test_a_driver_without_multiport_has_hvc0_alone() -> None:
    device = console()
    driver = Driver(device, features=0)
    assert device.ports[0].guest_open
    driver.send(DATA_TRANSMIT, [b"x"])
    driver.kick(DATA_TRANSMIT)
    driver.send(CONTROL_TRANSMIT, [struct.pack("<IHH", 0, DEVICE_READY, 1)])
    driver.kick(CONTROL_TRANSMIT)
    assert driver.used(DATA_TRANSMIT) == driver.used(CONTROL_TRANSMIT) == []
