"""The network card against a model of it: any driver, any wire."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.devices.virtio.net import HEADER_SIZE, RX, TX
from asyncvmm.testing.driver import Driver
from tests.support.network_card import NO_HEADER, OTHER, Wire, card, frame, metrics


class AnyDriver(RuleBasedStateMachine):
    """Every frame is received once, in order, or counted; every frame sent is sent once, in order, or counted."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire(room=500)
        self.driver = Driver(card(self.wire), queue_size=8, memory_size=1 << 17, event_idx=True)
        self.driver.kick(RX)
        self.number = 0
        self.expected_out: list[bytes] = []
        self.put: list[bytes] = []
        self.expected_in: list[bytes] = []

    def _next(self, size: int) -> bytes:
        self.number += 1
        return frame(self.number.to_bytes(4, "little") + bytes(size))

    def _full(self, queue: int) -> bool:
        """Whether another chain of two descriptors might find none."""
        offered = self.driver.queue(queue)
        return (offered.avail_index - offered.seen_used) & 0xFFFF >= 4

    @rule(size=st.integers(0, 300), cut=st.integers(1, 40), good=st.booleans(), kick=st.booleans())
    def send(self, size: int, cut: int, good: bool, kick: bool) -> None:
        if self._full(TX):
            return
        data = self._next(size) if good else frame(bytes(size), source=OTHER)
        if good:
            self.expected_out.append(data)
        packet = NO_HEADER + data
        self.driver.send(TX, [piece for piece in (packet[:cut], packet[cut:]) if piece])
        if kick:
            self.driver.kick(TX)

    @rule(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=2), kick=st.booleans())
    def offer(self, sizes: list[int], kick: bool) -> None:
        if self._full(RX):
            return
        self.driver.send(RX, writable=sizes)
        if kick:
            self.driver.kick(RX)

    @rule(size=st.integers(0, 300))
    def arrive(self, size: int) -> None:
        data = self._next(size)
        self.put.append(data)
        self.expected_in.append(data)
        self.wire.put(data)

    @rule(room=st.integers(1, 1000))
    def drain(self, room: int) -> None:
        self.wire.make_room(room)

    @rule()
    def collect(self) -> None:
        self.driver.used(TX)
        used = self.driver.used(RX)
        position = 0
        while position < len(used):
            count = int.from_bytes(b"".join(entry.data for entry in used[position:])[10:12], "little")
            group = used[position : position + count]
            assert len(group) == count, "a frame's buffers come together"
            data = b"".join(entry.data for entry in group)[HEADER_SIZE:]
            while self.expected_in.pop(0) != data:
                assert self.expected_in, "a frame that nobody put on the wire, or out of order"
            position += count

    @rule()
    def reset(self) -> None:
        self.collect()
        self.driver.reset()
        self.driver.start()
        self.expected_out = list(self.wire.sent)
        self.driver.kick(RX)

    @invariant()
    def nothing_is_invented(self) -> None:
        assert not self.driver.needs_reset
        assert self.wire.sent == self.expected_out[: len(self.wire.sent)]

    @invariant()
    def nothing_is_lost_in_silence(self) -> None:
        found = metrics(self.driver)
        assert found.rx_packets_count + found.rx_fails + len(self.wire.waiting) == len(self.put)
        assert found.tx_packets_count == len(self.wire.sent)


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
