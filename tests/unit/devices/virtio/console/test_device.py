"""The console device, driven through its real transport."""

from __future__ import annotations

from typing import Any

import pytest

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console.control import PORT_OPEN, PORT_READY, Control
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, MOST_BYTES, MOST_CHAINS
from asyncvmm.errors import ConfigError
from tests.support.console_guest import DATA_RECEIVE, DATA_TRANSMIT, RECEIVE, TRANSMIT, Linux, console, read, up

# -- without named ports -----------------------------------------------------------------------------------------------


def test_without_named_ports_there_are_two_queues_and_hvc0_is_open() -> None:
    device = console(ConsoleConfig())
    driver = Linux(device)
    assert (device.features, len(device.queues)) == (0, 2)
    assert device.ports[0].guest_open
    driver.request(TRANSMIT, [b"hello, ", b"host"])
    assert read(device, device.ports[0]) == b"hello, host"


def test_input_goes_into_the_guest_s_buffers_as_they_come() -> None:
    device = console(ConsoleConfig())
    driver = Linux(device)
    with device.session():
        device.ports[0].input = memoryview(b"echo hello\n")
        assert not device.feed(device.ports[0])
    driver.send(RECEIVE, writable=[3, 2])
    driver.send(RECEIVE, writable=[100])
    driver.kick(RECEIVE)
    assert [used.data for used in driver.used(RECEIVE)] == [b"echo ", b"hello\n"]
    assert not device.ports[0].input
    assert device.metrics.rx_bytes_count == 11
    assert device.metrics.no_rx_avail_buffer == 1


# -- bytes from the guest ----------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_the_guest_back_and_loses_nothing() -> None:
    device = console(backlog_bytes=100)
    driver, port = up(device), device.ports[1]
    with device.session():
        device.open_port(port)
    for letter in b"abcdef":
        driver.send(DATA_TRANSMIT, [bytes([letter]) * 40])
    driver.kick(DATA_TRANSMIT)
    assert port.backlog == 100
    assert len(driver.used(DATA_TRANSMIT)) == 2, "of the third a part is read"
    assert device.metrics.tx_throttled == 1
    assert read(device, port) == b"".join(bytes([letter]) * 40 for letter in b"abcdef")
    assert len(driver.used(DATA_TRANSMIT)) == 4
    assert (port.lost, device.metrics.tx_bytes_count, device.metrics.tx_count) == (0, 240, 6)


def test_hvc0_never_waits_for_a_reader_that_is_not_there() -> None:
    device = console(backlog_bytes=10)
    driver, port = up(device), device.ports[0]
    for number in range(20):
        driver.request(TRANSMIT, [b"line %02d\n" % number])
    assert port.lost == device.metrics.tx_lost_bytes == 150
    assert read(device, port) == b"8\nline 19\n"
    driver.request(TRANSMIT, [b"10 letters"])
    driver.send(TRANSMIT, [b"more"])
    driver.kick(TRANSMIT)
    assert driver.used(TRANSMIT) == [], "it waits for one that is"
    assert read(device, port) == b"10 lettersmore"


def test_what_is_written_to_a_port_that_nobody_has_is_dropped_and_counted() -> None:
    device = console()
    driver, port = up(device), device.ports[1]
    driver.request(DATA_TRANSMIT, [b"anybody?"])
    assert (port.backlog, port.lost, device.metrics.tx_lost_bytes) == (0, 8, 8)


def test_closing_a_port_lets_a_guest_go_that_was_held_back() -> None:
    device = console(backlog_bytes=10)
    driver, port = up(device), device.ports[1]
    with device.session():
        device.open_port(port)
    for _ in range(40):
        driver.send(DATA_TRANSMIT, [b"12345678"])
    driver.kick(DATA_TRANSMIT)
    with device.session():
        device.close_port(port)
    assert len(driver.used(DATA_TRANSMIT)) == 40
    assert port.lost == 320


def test_one_turn_takes_a_bounded_number_of_buffers_and_bytes() -> None:
    device = console(backlog_bytes=4 * MOST_BYTES)
    driver, port = Linux(device, memory_size=32 << 20), device.ports[0]
    with device.session():
        port.reading = True
    for _ in range(MOST_CHAINS + 1):
        driver.send(TRANSMIT, [b"x"])
    assert driver.transport.kick(TRANSMIT)
    assert port.backlog == MOST_CHAINS
    assert not driver.transport.kick(TRANSMIT)
    driver.used(TRANSMIT)
    driver.send(TRANSMIT, [bytes(MOST_BYTES), bytes(MOST_BYTES)])
    assert driver.transport.kick(TRANSMIT)
    assert port.backlog == MOST_CHAINS + 1 + MOST_BYTES
    driver.transport.kick(TRANSMIT)
    driver.transport.kick(TRANSMIT)
    assert len(driver.used(TRANSMIT)) == 1


def test_a_buffer_with_nothing_to_read_is_returned_and_counted() -> None:
    device = console()
    driver = up(device)
    driver.request(TRANSMIT, writable=[10])
    assert device.metrics.tx_fails == 1


# -- bytes for the guest -----------------------------------------------------------------------------------------------


def test_a_named_port_gets_its_input_when_the_guest_opens_it() -> None:
    device = console()
    driver, port = Linux(device), device.ports[1]
    driver.tell(1, PORT_READY)
    driver.send(DATA_RECEIVE, writable=[10])
    driver.kick(DATA_RECEIVE)
    with device.session():
        port.input = memoryview(b"early")
        assert not device.feed(port)
    assert driver.used(DATA_RECEIVE) == []
    driver.tell(1, PORT_OPEN)
    assert [used.data for used in driver.used(DATA_RECEIVE)] == [b"early"]


def test_a_buffer_that_cannot_be_written_is_returned_and_counted() -> None:
    device = console(ConsoleConfig())
    driver = Linux(device)
    driver.send(RECEIVE, [b"not to be written"])
    driver.send(RECEIVE, writable=[10])
    with device.session():
        device.ports[0].input = memoryview(b"x")
        device.feed(device.ports[0])
    assert [used.data for used in driver.used(RECEIVE)] == [b"", b"x"]
    assert device.metrics.rx_fails == 1


# -- reset, snapshots --------------------------------------------------------------------------------------------------


def test_after_a_reset_a_buffer_that_was_read_in_part_is_never_touched() -> None:
    device = console(backlog_bytes=10)
    driver, port = up(device), device.ports[1]
    with device.session():
        device.open_port(port)
    driver.send(DATA_TRANSMIT, [b"0123456789abcdef"])
    driver.kick(DATA_TRANSMIT)
    driver.reset()
    assert not port.guest_open
    assert read(device, port) == b"0123456789", "what was taken is still there"
    driver.start()
    for _ in range(8):
        driver.send(CONTROL_RECEIVE, writable=[64])
    driver.tell(1, PORT_READY)
    driver.tell(1, PORT_OPEN)
    driver.request(DATA_TRANSMIT, [b"new"])
    assert read(device, port) == b"new"


def test_a_restored_console_reads_on_where_it_was() -> None:
    device = console(backlog_bytes=10)
    driver, port = up(device), device.ports[1]
    with device.session():
        device.open_port(port)
    driver.send(DATA_TRANSMIT, [b"0123456789abcdef"])
    driver.kick(DATA_TRANSMIT)
    saved = driver.transport.state()
    again = console()
    transport = driver.new_transport(again)
    transport.restore(saved)
    with again.session():
        again.open_port(again.ports[1])
    assert again.ports[1].guest_open
    transport.kick(DATA_TRANSMIT)
    assert read(again, again.ports[1]) == b"abcdef"
    assert len(driver.used(DATA_TRANSMIT)) == 1


def test_a_restored_guest_hears_whether_the_host_has_its_ports_now() -> None:
    driver = up(console())
    again = console()
    transport = driver.new_transport(again)
    with again.session():
        again.open_port(again.ports[2])
    transport.restore(driver.transport.state())
    transport.kick(CONTROL_RECEIVE)
    assert driver.heard() == [Control(1, PORT_OPEN, 0), Control(2, PORT_OPEN, 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ports": None},
        {"ports": []},
        {"ports": [1, 2, 3]},
        {"ports": [{"name": "console"}, {"name": "data"}, {"name": "more"}]},
        {"messages": None},
        {"messages": ["zz"]},
        {"messages": [""] * 1000},
        {"messages": ["00" * 100]},
    ],
)
def test_a_saved_state_that_no_console_has_is_refused(wrong: dict[str, Any]) -> None:
    device = console()
    with pytest.raises(ConfigError):
        device.restore(device.state() | wrong)
