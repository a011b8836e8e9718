"""The console against a model of it: anything in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.devices.virtio.console.control import PORT_OPEN, PORT_READY
from asyncvmm.devices.virtio.console.device import CONTROL_TRANSMIT, DATA_QUEUE_SIZE
from tests.support.console_guest import DATA_RECEIVE, DATA_TRANSMIT, Linux, console


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
