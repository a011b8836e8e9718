"""The balloon device, driven through its real transport."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.virtio.balloon.device import (
    ACTUAL,
    CMD_ID_DONE,
    CMD_ID_STOP,
    DEFLATE,
    FREE_PAGE,
    FREE_PAGE_HINT_CMD_ID,
    INFLATE,
    MOST_CHAINS,
    MOST_RANGES,
    MOST_RELEASED,
    NUM_PAGES,
    REPORTING,
    STATS,
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    VIRTIO_BALLOON_F_PAGE_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
    VirtioBalloon,
)
from asyncvmm.devices.virtio.balloon.pages import PAGE_BYTES, Range
from asyncvmm.devices.virtio.ids import STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK
from asyncvmm.devices.virtio.queue import DESC_F_WRITE
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    STATUS,
)
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.counters import kinds
from asyncvmm.metrics.groups import BalloonMetrics
from asyncvmm.testing.driver import Driver

RAM = 5 << 18
ALL = BalloonConfig(free_page_hinting=True)


class Host:
    """Remembers what was given back, and zeroes it. ``refuse``: pages that cannot be taken."""

    def __init__(self) -> None:
        self.memory = bytearray()
        self.released: list[Range] = []
        self.refuse: set[int] = set()

    def release(self, ranges: list[Range]) -> int:
        self.released += ranges
        taken = [(address, size) for address, size in ranges if address // PAGE_BYTES not in self.refuse]
        for address, size in taken:
            if address + size <= len(self.memory):
                self.memory[address : address + size] = bytes(size)
        return sum(size for _, size in taken)


def balloon(config: BalloonConfig = ALL, ram: int = RAM) -> tuple[VirtioBalloon, Host]:
    host = Host()
    return VirtioBalloon(config, [(0, ram)], host, BalloonMetrics()), host


def driven(config: BalloonConfig = ALL) -> tuple[Driver, VirtioBalloon, Host]:
    device, host = balloon(config)
    return Driver(device, memory_size=RAM), device, host


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def statistics(**values: int) -> bytes:
    tags = {"free_memory": 4, "total_memory": 5}
    return b"".join(struct.pack("<HQ", tags[name], value) for name, value in values.items())


def counted(device: VirtioBalloon) -> dict[str, Any]:
    """The counters that are not 0."""
    return {name: value for name in kinds(BalloonMetrics) if (value := getattr(device.metrics, name))}


# -- features and queues -----------------------------------------------------------------------------------------------


def test_what_is_offered_is_what_was_asked_for() -> None:
    stats, oom = 1 << VIRTIO_BALLOON_F_STATS_VQ, 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
    hint, report = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT, 1 << VIRTIO_BALLOON_F_PAGE_REPORTING
    assert balloon(BalloonConfig(deflate_on_oom=False, free_page_reporting=False))[0].features == stats
    assert balloon(ALL)[0].features == stats | oom | hint | report


def linux(device: VirtioBalloon, features: int, queues: int) -> Driver:
    """A driver that makes only so many queues ready, from 0 on."""
    driver = Driver(device, memory_size=RAM, features=features, start=False)
    ready = STATUS_ACKNOWLEDGE | STATUS_DRIVER
    driver.write(STATUS, ready)
    driver.accept(features | 1 << 32)
    driver.write(STATUS, ready | STATUS_FEATURES_OK)
    driver.queues = [driver._set_up(index, RAM // 5) for index in range(queues)]
    driver.write(STATUS, ready | STATUS_FEATURES_OK | STATUS_DRIVER_OK)
    return driver


def test_a_driver_that_closes_the_gaps_between_queues_is_understood() -> None:
    device, host = balloon()
    driver = linux(device, 1 << VIRTIO_BALLOON_F_PAGE_REPORTING, 3)
    driver.request(2, writable=[3 * PAGE_BYTES])
    assert len(host.released) == 1
    assert device.metrics.free_page_report_count == 1


def test_a_driver_that_leaves_the_gaps_between_queues_is_understood() -> None:
    device, host = balloon()
    driver = Driver(device, memory_size=RAM, features=1 << VIRTIO_BALLOON_F_PAGE_REPORTING)
    driver.request(REPORTING, writable=[3 * PAGE_BYTES])
    assert len(host.released) == 1
    driver.send(STATS, [statistics(free_memory=1)])
    driver.kick(STATS)
    assert driver.used(STATS) == [], "that queue does not exist"


# -- inflating and deflating -------------------------------------------------------------------------------------------


def test_inflating_gives_sorted_coalesced_pages_back() -> None:
    driver, device, host = driven()
    driver.request(INFLATE, [words(7, 3, 5, 4, 3), words(100)])
    assert host.released == [(3 * PAGE_BYTES, 3 * PAGE_BYTES), (7 * PAGE_BYTES, PAGE_BYTES), (100 * PAGE_BYTES, 4096)]
    assert counted(device) == {"inflate_count": 1}


def test_pages_outside_ram_are_left_alone_and_counted() -> None:
    driver, device, host = driven()
    driver.request(INFLATE, [words(RAM // PAGE_BYTES - 1, RAM // PAGE_BYTES, 0xFFFFFFFF)])
    assert host.released == [(RAM - PAGE_BYTES, PAGE_BYTES)]
    assert counted(device) == {"inflate_count": 1, "event_fails": 1}


@pytest.mark.parametrize("request_bytes", [b"\1", bytes(7), bytes(4100)])
def test_a_request_that_is_not_page_numbers_is_returned_and_counted(request_bytes: bytes) -> None:
    driver, device, host = driven()
    driver.request(INFLATE, [request_bytes])
    assert not host.released
    assert counted(device) == {"inflate_count": 1, "event_fails": 1}


def test_a_request_with_nothing_to_read_is_returned_and_counted() -> None:
    driver, device, _ = driven()
    assert driver.request(INFLATE, writable=[64]) == b""
    assert counted(device) == {"inflate_count": 1, "event_fails": 1}


def test_deflating_is_acknowledged() -> None:
    driver, device, host = driven()
    driver.request(DEFLATE, [words(1, 2, 3)])
    assert not host.released
    assert counted(device) == {"deflate_count": 1}


def test_what_the_host_cannot_take_is_counted() -> None:
    driver, device, host = driven()
    host.refuse = {5}
    driver.request(INFLATE, [words(5)])
    assert counted(device) == {"inflate_count": 1, "event_fails": 1}


def test_one_turn_handles_a_bounded_number_of_requests() -> None:
    driver, device, _ = driven()
    for pfn in range(MOST_CHAINS + 1):
        driver.send(INFLATE, [words(200 + pfn)])
    assert driver.transport.kick(INFLATE), "there is more to do"
    assert len(driver.used(INFLATE)) == MOST_CHAINS
    assert not driver.transport.kick(INFLATE)
    assert device.metrics.inflate_count == MOST_CHAINS + 1


def test_one_turn_gives_a_bounded_number_of_ranges_back() -> None:
    device, host = balloon(ram=1 << 40)
    driver = Driver(device, memory_size=RAM)
    for request in range(3):
        driver.send(INFLATE, [words(*range(request * 2000, request * 2000 + 1000, 2))])
    assert driver.transport.kick(INFLATE)
    assert len(host.released) == MOST_RANGES
    assert len(driver.used(INFLATE)) == 2
    assert not driver.transport.kick(INFLATE)
    assert len(host.released) == 1500
    assert counted(device) == {"inflate_count": 3}


def test_a_large_report_is_given_back_in_turns_and_returned_at_the_end() -> None:
    device, host = balloon(ram=1 << 40)
    driver = Driver(device, memory_size=5 << 24)
    queue = driver.queue(REPORTING)
    queue.set_descriptor(0, 0, MOST_RELEASED * 2 + PAGE_BYTES, DESC_F_WRITE, 0)
    queue.put_available(0)
    for turn in range(2):
        assert driver.transport.kick(REPORTING), turn
        assert host.released[-1] == (turn * MOST_RELEASED, MOST_RELEASED)
        assert driver.used(REPORTING) == []
    assert not driver.transport.kick(REPORTING)
    assert [entry.head for entry in driver.used(REPORTING)] == [0]
    assert counted(device) == {
        "free_page_report_count": 1,
        "free_page_report_freed": MOST_RELEASED * 2 + PAGE_BYTES,
    }


def test_a_report_that_a_reset_overtakes_is_forgotten() -> None:
    device, host = balloon(ram=1 << 40)
    driver = Driver(device, memory_size=5 << 24)
    driver.queue(REPORTING).set_descriptor(0, 0, MOST_RELEASED * 2, DESC_F_WRITE, 0)
    driver.queue(REPORTING).put_available(0)
    driver.transport.kick(REPORTING)
    driver.reset()
    host.released.clear()
    driver.start()
    driver.request(REPORTING, writable=[2 * PAGE_BYTES])
    assert sum(size for _, size in host.released) <= 2 * PAGE_BYTES
    assert device.metrics.free_page_report_count == 1


# -- the size asked for ------------------------------------------------------------------------------------------------


def test_the_first_target_is_the_configured_size() -> None:
    driver, device, _ = driven(BalloonConfig(mib=3))
    assert driver.config(NUM_PAGES, 4) == words(768)
    assert device.target_pages == 768


def test_a_new_target_is_shown_and_announced() -> None:
    driver, device, _ = driven()
    before = driver.interrupts
    with device.session() as running:
        assert running
        device.set_target_pages(25600)
    assert driver.config(NUM_PAGES, 4) == words(25600)
    assert driver.interrupts == before + 1
    assert driver.acknowledge() & 2


def test_the_driver_says_how_far_it_is_and_can_write_nothing_else() -> None:
    driver, device, _ = driven(BalloonConfig(mib=1))
    driver.write(CONFIG + ACTUAL, 77)
    driver.write(CONFIG + NUM_PAGES, 5)
    driver.write(CONFIG + FREE_PAGE_HINT_CMD_ID, 5)
    driver.write(CONFIG + ACTUAL + 2, 0xFFFFFFFF)
    assert (device.target_pages, device.actual_pages) == (256, 77)
    assert device.config[FREE_PAGE_HINT_CMD_ID:] == words(0)


def test_the_largest_size_that_can_be_configured_fits_the_field() -> None:
    assert balloon(BalloonConfig(mib=16 * 1024 * 1024))[0].target_pages == (1 << 32) - 1


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_come_by_returning_the_buffer_with_the_last_ones() -> None:
    driver, device, _ = driven()
    news: list[int | None] = []
    device.on_stats = lambda: news.append(device.stats().free_memory)
    driver.send(STATS, [statistics(free_memory=10, total_memory=20)])
    driver.kick(STATS)
    assert driver.used(STATS) == [], "the device keeps it until it wants new ones"
    with device.session():
        assert device.request_stats()
        assert not device.request_stats(), "the driver has it now"
    assert len(driver.used(STATS)) == 1
    driver.send(STATS, [statistics(free_memory=11)])
    driver.kick(STATS)
    assert news == [10, 11]
    assert device.stats().total_memory == 20
    assert counted(device) == {"stats_updates_count": 2}


@pytest.mark.parametrize("data", [bytes(9), bytes(650)])
def test_malformed_statistics_are_counted_and_their_buffer_kept(data: bytes) -> None:
    driver, device, _ = driven()
    driver.send(STATS, [data])
    driver.kick(STATS)
    assert counted(device) == {"stats_update_fails": 1}
    with device.session():
        assert device.request_stats()


def test_of_two_statistics_buffers_the_older_goes_back() -> None:
    driver, _, _ = driven()
    heads = [driver.send(STATS, [statistics(free_memory=value)]) for value in (1, 2)]
    driver.kick(STATS)
    assert [entry.head for entry in driver.used(STATS)] == heads[:1]


def test_a_reset_forgets_the_buffer_and_what_it_said() -> None:
    driver, device, _ = driven()
    driver.send(STATS, [statistics(free_memory=1)])
    driver.kick(STATS)
    driver.reset()
    assert not device.request_stats()
    assert device.stats().free_memory is None


# -- free pages --------------------------------------------------------------------------------------------------------


def test_reported_pages_are_given_back_and_their_bytes_counted() -> None:
    driver, device, host = driven()
    host.memory = driver.memory
    queue = driver.queue(REPORTING)
    driver.memory[0x20000:0x28000] = b"\1" * 0x8000
    queue.set_descriptor(0, 0x20000, 0x4000, DESC_F_WRITE | 1, 1)
    queue.set_descriptor(1, 0x24800, 0x3000, DESC_F_WRITE, 0)
    queue.put_available(0)
    driver.kick(REPORTING)
    assert host.released == [(0x20000, 0x4000), (0x25000, 0x2000)]
    assert counted(device) == {"free_page_report_count": 1, "free_page_report_freed": 0x6000}
    assert driver.used(REPORTING)[0].written == 0


def test_a_report_that_names_nothing_is_counted() -> None:
    driver, device, _ = driven()
    driver.request(REPORTING, [b"what?"])
    assert counted(device) == {"free_page_report_count": 1, "free_page_report_fails": 1}


def test_a_report_of_what_is_not_ram_ends_the_driver() -> None:
    driver, _, host = driven()
    driver.queue(REPORTING).set_descriptor(0, RAM - PAGE_BYTES, 2 * PAGE_BYTES, DESC_F_WRITE, 0)
    driver.queue(REPORTING).put_available(0)
    driver.kick(REPORTING)
    assert driver.needs_reset
    assert not host.released


def ask_for_hints(driver: Driver, device: VirtioBalloon) -> int:
    with device.session():
        device.start_hinting()
    return int.from_bytes(driver.config(FREE_PAGE_HINT_CMD_ID, 4), "little")


def test_hinted_pages_are_given_back_between_start_and_stop() -> None:
    driver, device, host = driven()
    done: list[int] = []
    device.on_hinted = lambda: done.append(device.hinted_bytes)
    command = ask_for_hints(driver, device)
    assert command >= 2
    driver.request(FREE_PAGE, [words(command)])
    driver.request(FREE_PAGE, writable=[2 * PAGE_BYTES])
    freed = sum(size for _, size in host.released)
    assert freed >= PAGE_BYTES
    driver.request(FREE_PAGE, [words(CMD_ID_STOP)])
    assert done == [freed]
    assert driver.config(FREE_PAGE_HINT_CMD_ID, 4) == words(CMD_ID_DONE)
    assert counted(device) == {"free_page_hint_count": 1, "free_page_hint_freed": freed}


def test_hints_that_answer_an_older_command_are_not_taken() -> None:
    driver, device, host = driven()
    old = ask_for_hints(driver, device)
    new = ask_for_hints(driver, device)
    assert new != old
    driver.request(FREE_PAGE, [words(old)])
    driver.request(FREE_PAGE, writable=[2 * PAGE_BYTES])
    assert not host.released
    assert counted(device) == {"free_page_hint_count": 1, "free_page_hint_fails": 1}


@pytest.mark.parametrize("command", [CMD_ID_STOP, CMD_ID_DONE])
def test_a_stop_without_a_start_means_nothing(command: int) -> None:
    driver, device, _ = driven()
    driver.request(FREE_PAGE, [words(command)])
    assert driver.config(FREE_PAGE_HINT_CMD_ID, 4) == words(0)
    assert counted(device) == {}


def test_command_ids_skip_the_reserved_ones_when_they_wrap() -> None:
    driver, device, _ = driven()
    device.restore({"hinting": False, "last_cmd_id": 0xFFFFFFFF, "statistics": {}})
    assert ask_for_hints(driver, device) == 2


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_a_restored_balloon_takes_the_statistics_buffer_again() -> None:
    driver, device, _ = driven(BalloonConfig(mib=1, free_page_hinting=True))
    driver.send(STATS, [statistics(free_memory=5)])
    driver.kick(STATS)
    saved = driver.transport.state()
    assert device.drain()
    again, _ = balloon(BalloonConfig(free_page_hinting=True))
    transport = driver.new_transport(again)
    transport.restore(saved)
    assert again.target_pages == 256
    assert again.stats().free_memory == 5
    transport.kick(STATS)
    with again.session():
        assert again.request_stats()
    assert len(driver.used(STATS)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"hinting": 1},
        {"last_cmd_id": -1},
        {"last_cmd_id": 1 << 32},
        {"statistics": None},
        {"statistics": {"free_memory": "much"}},
        {"statistics": {"target_pages": 1}},
    ],
)
def test_a_saved_state_that_no_balloon_has_is_refused(wrong: dict[str, Any]) -> None:
    device, _ = balloon()
    with pytest.raises(ConfigError):
        device.restore(device.state() | wrong)


# -- anything in any order ---------------------------------------------------------------------------------------------


class AnyDriver(RuleBasedStateMachine):
    """A driver that does anything, and a count of what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.driver, self.device, self.host = driven()
        self.expected = dict.fromkeys(("inflate_count", "deflate_count", "free_page_report_count"), 0)
        self.statistics = 0

    @rule(data=st.binary(min_size=1, max_size=64))
    def inflate(self, data: bytes) -> None:
        self.driver.request(INFLATE, [data])
        self.expected["inflate_count"] += 1

    @rule(pfns=st.lists(st.integers(0, 300), min_size=1, max_size=40))
    def inflate_pages(self, pfns: list[int]) -> None:
        self.driver.request(INFLATE, [words(*pfns)])
        self.expected["inflate_count"] += 1

    @rule(data=st.binary(min_size=1, max_size=64))
    def deflate(self, data: bytes) -> None:
        self.driver.request(DEFLATE, [data])
        self.expected["deflate_count"] += 1

    @rule(data=st.binary(min_size=1, max_size=64))
    def give_statistics(self, data: bytes) -> None:
        self.driver.send(STATS, [data])
        self.driver.kick(STATS)
        assert len(self.driver.used(STATS)) <= 1
        self.statistics += 1

    @rule()
    def ask_for_statistics(self) -> None:
        with self.device.session():
            self.device.request_stats()
        self.driver.used(STATS)

    @rule(sizes=st.lists(st.integers(1, 3 * PAGE_BYTES), min_size=1, max_size=4))
    def report(self, sizes: list[int]) -> None:
        self.driver.request(REPORTING, writable=sizes)
        self.expected["free_page_report_count"] += 1

    @rule(command=st.integers(0, 5), sizes=st.lists(st.integers(1, 3 * PAGE_BYTES), max_size=3))
    def hint(self, command: int, sizes: list[int]) -> None:
        self.driver.request(FREE_PAGE, [words(command)], sizes)

    @rule()
    def ask_for_hints(self) -> None:
        with self.device.session():
            self.device.start_hinting()

    @rule(offset=st.integers(0, 15), value=st.integers(0, (1 << 32) - 1))
    def write_config(self, offset: int, value: int) -> None:
        self.driver.write(CONFIG + offset, value)

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        self.driver.start()

    @invariant()
    def every_page_is_ram_and_every_request_is_counted(self) -> None:
        assert not self.driver.needs_reset
        assert all(address >= 0 and address + size <= RAM for address, size in self.host.released)
        metrics = self.device.metrics
        assert {name: getattr(metrics, name) for name in self.expected} == self.expected
        assert metrics.stats_updates_count + metrics.stats_update_fails == self.statistics


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
