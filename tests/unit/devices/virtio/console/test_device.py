"""The console device, driven through its real transport."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.device_config import ConsoleConfig
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
from asyncvmm.devices.virtio.console.device import (
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    DATA_QUEUE_SIZE,
    MAX_NR_PORTS,
    MOST_BYTES,
    MOST_CHAINS,
    MOST_CONTROL,
    VirtioConsole,
)
from asyncvmm.devices.virtio.console.port import ConsolePort
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.testing.driver import Driver

RECEIVE, TRANSMIT = 0, 1
DATA_RECEIVE, DATA_TRANSMIT = 4, 5
TWO = ConsoleConfig(ports=("data", "more"))


def console(config: ConsoleConfig = TWO, backlog_bytes: int = 1000) -> VirtioConsole:
    return VirtioConsole(config, ConsoleMetrics(), backlog_bytes=backlog_bytes)


class Linux(Driver):
    """A driver with buffers for control messages."""

    def __init__(self, device: VirtioConsole, *, buffers: int = 16, **options: Any) -> None:
        super().__init__(device, **options)
        if len(self.queues) > 2:
            self.listen(buffers)

    def listen(self, buffers: int) -> None:
        """Offer so many buffers for control messages."""
        for _ in range(buffers):
            self.send(CONTROL_RECEIVE, writable=[64])
        self.kick(CONTROL_RECEIVE)

    def tell(self, port: int, event: int, value: int = 1) -> None:
        """Send a control message."""
        self.request(CONTROL_TRANSMIT, [struct.pack("<IHH", port, event, value)])

    def heard(self) -> list[Control]:
        """The device's control messages; their buffers are offered again."""
        messages = [Control.parse(used.data) for used in self.used(CONTROL_RECEIVE)]
        self.listen(len(messages))
        return messages

    def bring_up(self) -> None:
        """As Linux does, with each named port opened."""
        self.tell(0, DEVICE_READY)
        for port in range(3):
            self.tell(port, PORT_READY)
            self.tell(port, PORT_OPEN)
        self.heard()


def up(device: VirtioConsole) -> Linux:
    driver = Linux(device)
    driver.bring_up()
    return driver


def read(device: VirtioConsole, port: ConsolePort) -> bytes:
    """All there is, as a reader takes it."""
    data = b""
    with device.session():
        port.reading = True
        while port.backlog:
            data += port.take(64)
            device.take_more(port)
    return data


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


# -- control messages --------------------------------------------------------------------------------------------------


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


# -- anything in any order ---------------------------------------------------------------------------------------------


class AnyDriver(RuleBasedStateMachine):
    """Bytes arrive whole and in order both ways, whatever else the driver does."""

    def __init__(self) -> None:
        super().__init__()
        self.device = console(backlog_bytes=50)
        self.port = self.device.ports[1]
        self.written = self.got = self.sent = self.received = b""
        self.driver = Linux(self.device, buffers=0)
        self.start()
        with self.device.session():
            self.device.open_port(self.port)

    def start(self) -> None:
        self.driver.tell(1, PORT_READY)
        self.driver.tell(1, PORT_OPEN)

    def room(self, queue: int) -> bool:
        return len(self.driver.queue(queue)._free) > 4

    @precondition(lambda self: self.room(DATA_TRANSMIT))
    @rule(pieces=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3))
    def write(self, pieces: list[bytes]) -> None:
        self.driver.send(DATA_TRANSMIT, pieces)
        self.written += b"".join(pieces)

    @precondition(lambda self: self.room(DATA_RECEIVE))
    @rule(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=2))
    def offer_room(self, sizes: list[int]) -> None:
        self.driver.send(DATA_RECEIVE, writable=sizes)

    @rule(queue=st.integers(0, 5))
    def kick(self, queue: int) -> None:
        self.driver.kick(queue)

    @precondition(lambda self: self.room(CONTROL_TRANSMIT))
    @rule(data=st.binary(min_size=1, max_size=10))
    def chatter(self, data: bytes) -> None:
        if data[:1] != b"\1":
            self.driver.send(CONTROL_TRANSMIT, [data])
            self.driver.kick(CONTROL_TRANSMIT)
            self.driver.used(CONTROL_TRANSMIT)

    @rule(most=st.integers(1, 60))
    def read(self, most: int) -> None:
        with self.device.session():
            if self.port.backlog:
                self.got += self.port.take(most)
            self.device.take_more(self.port)

    @rule(data=st.binary(min_size=1, max_size=60))
    def send(self, data: bytes) -> None:
        if not self.port.input:
            with self.device.session():
                self.port.input = memoryview(data)
                self.device.feed(self.port)
            self.sent += data

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        while self.port.backlog:
            self.got += self.port.take(100)
        self.port.input = memoryview(b"")
        assert self.written.startswith(self.got)
        self.driver.start()
        self.start()
        self.written = self.got = self.sent = self.received = b""

    @invariant()
    def bytes_arrive_whole_and_in_order(self) -> None:
        assert not self.driver.needs_reset
        assert self.port.backlog <= 50
        assert self.port.lost == 0
        self.driver.used(DATA_TRANSMIT)
        self.received += b"".join(used.data for used in self.driver.used(DATA_RECEIVE))
        assert self.written.startswith(self.got)
        assert self.sent == self.received + bytes(self.port.input)

    def teardown(self) -> None:
        self.driver.kick(DATA_TRANSMIT)
        for _ in range(DATA_QUEUE_SIZE):
            self.read(1000)
        assert self.got == self.written


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
