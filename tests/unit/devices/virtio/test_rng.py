"""The entropy device, driven through its real transport."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.device_config import RngConfig
from asyncvmm.devices.virtio.rng import MOST_BYTES, MOST_CHAINS, VirtioRng
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import EntropyMetrics
from asyncvmm.testing.driver import Driver

UNLIMITED = RngConfig(bytes_per_s=0)


class Time:
    """A clock, and timers that fire when it is moved."""

    def __init__(self) -> None:
        self.ns = 0
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def clock_ns(self) -> int:
        return self.ns

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._timers, (self.ns + round(seconds * 1e9), self._count, callback))

    def run(self, ns: int) -> None:
        end = self.ns + ns
        while self._timers and self._timers[0][0] <= end:
            self.ns, _, callback = heapq.heappop(self._timers)
            callback()
        self.ns = end

    @property
    def pending(self) -> int:
        return len(self._timers)


def rng(config: RngConfig, source: Callable[[int], bytes] = os.urandom) -> tuple[VirtioRng, Time]:
    time = Time()
    return VirtioRng(config, source, EntropyMetrics(), clock_ns=time.clock_ns, later=time.later), time


def test_a_buffer_is_filled_across_its_pieces() -> None:
    device, _ = rng(UNLIMITED, lambda size: bytes(range(1, size + 1)))
    assert Driver(device).request(0, writable=[3, 4, 5]) == bytes(range(1, 13))
    assert device.metrics.entropy_bytes == 12
    assert device.metrics.entropy_event_count == 1


def test_two_requests_get_different_bytes() -> None:
    driver = Driver(rng(UNLIMITED)[0])
    assert driver.request(0, writable=[32]) != driver.request(0, writable=[32])


def test_a_huge_buffer_is_filled_in_part() -> None:
    driver = Driver(rng(UNLIMITED)[0])
    assert len(driver.request(0, writable=[MOST_BYTES, MOST_BYTES])) == MOST_BYTES


def test_a_request_that_cannot_be_written_is_returned_and_counted() -> None:
    device, _ = rng(RngConfig())
    assert Driver(device).request(0, [b"give me some"]) == b""
    assert device.metrics.entropy_event_fails == 1


def test_a_source_that_fails_is_counted_and_the_request_returned() -> None:
    def broken(_: int) -> bytes:
        raise OSError

    device, _ = rng(UNLIMITED, broken)
    assert Driver(device).request(0, writable=[8]) == b""
    assert (device.metrics.host_rng_fails, device.metrics.entropy_event_fails) == (1, 1)


def test_one_turn_fills_a_bounded_number_of_buffers() -> None:
    driver = Driver(rng(UNLIMITED)[0])
    for _ in range(MOST_CHAINS + 1):
        driver.send(0, writable=[8])
    assert driver.transport.kick(0)
    assert len(driver.used(0)) == MOST_CHAINS
    assert not driver.transport.kick(0)


def test_a_request_beyond_the_limit_waits_and_is_counted_once() -> None:
    device, time = rng(RngConfig(bytes_per_s=100, burst_bytes=50))
    driver = Driver(device)
    driver.request(0, writable=[50])
    driver.send(0, writable=[20])
    driver.kick(0)
    driver.kick(0)
    assert driver.used(0) == []
    assert (device.metrics.entropy_rate_limiter_throttled, time.pending) == (1, 1)
    time.run(199_000_000)
    assert driver.used(0) == []
    interrupts = driver.interrupts
    time.run(1_000_001)
    assert [used.written for used in driver.used(0)] == [20]
    assert driver.interrupts == interrupts + 1
    assert device.metrics.rate_limiter_event_count == 1


def test_a_request_larger_than_the_burst_gets_the_burst() -> None:
    device, _ = rng(RngConfig(bytes_per_s=100, burst_bytes=50))
    assert len(Driver(device).request(0, writable=[500])) == 50


def test_a_reset_while_a_request_waits_ends_in_nothing() -> None:
    device, time = rng(RngConfig(bytes_per_s=1, burst_bytes=8))
    driver = Driver(device)
    driver.request(0, writable=[8])
    driver.send(0, writable=[8])
    driver.kick(0)
    driver.reset()
    before = bytes(driver.memory)
    time.run(60 * 10**9)
    assert bytes(driver.memory) == before
    driver.start()
    assert len(driver.request(0, writable=[8])) == 8


def test_a_restored_device_has_no_new_burst() -> None:
    device, _ = rng(RngConfig(bytes_per_s=1, burst_bytes=8))
    driver = Driver(device)
    driver.request(0, writable=[6])
    again, _ = rng(RngConfig(bytes_per_s=1, burst_bytes=8))
    driver.new_transport(again).restore(driver.transport.state())
    assert again.state() == {"tokens": 2}


@pytest.mark.parametrize("tokens", [-1, None, 1 << 41])
def test_a_saved_state_that_no_device_has_is_refused(tokens: int | None) -> None:
    with pytest.raises(ConfigError):
        rng(RngConfig())[0].restore({"tokens": tokens})


class AnyDriver(RuleBasedStateMachine):
    """Requests of any shape at any time get each its bytes in the end, and never more than the limit allows."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.time = rng(RngConfig(bytes_per_s=1000, burst_bytes=100))
        self.driver = Driver(self.device)
        self.asked: list[int] = []
        self.given = 0

    @rule(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3), readable=st.binary(max_size=3))
    def request(self, sizes: list[int], readable: bytes) -> None:
        if len(self.asked) < 12:
            self.driver.send(0, [readable] if readable else [], sizes)
            self.asked.append(min(sum(sizes), 100))

    @rule()
    def kick(self) -> None:
        self.driver.kick(0)

    @rule(ns=st.integers(0, 200_000_000))
    def wait(self, ns: int) -> None:
        self.time.run(ns)

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        self.driver.start()
        self.asked.clear()

    @invariant()
    def what_is_given_is_what_was_asked_for_within_the_limit(self) -> None:
        for used in self.driver.used(0):
            assert used.written == len(used.data) == self.asked.pop(0)
            self.given += used.written
        assert self.given <= self.device.metrics.entropy_bytes <= 100 + self.time.ns * 1000 // 10**9
        assert self.time.pending <= 1

    def teardown(self) -> None:
        self.driver.kick(0)
        self.time.run(60 * 10**9)
        assert [used.written for used in self.driver.used(0)] == self.asked


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
