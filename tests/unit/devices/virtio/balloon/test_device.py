"""The balloon device, driven through its real transport."""

from __future__ import annotations

from typing import Any

import pytest

from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.virtio.balloon.device import (
    ACTUAL,
    DEFLATE,
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
from asyncvmm.devices.virtio.balloon.pages import PAGE_BYTES
from asyncvmm.devices.virtio.ids import STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK
from asyncvmm.devices.virtio.queue import DESC_F_WRITE
from asyncvmm.devices.virtio.registers import CONFIG, STATUS
from asyncvmm.errors import ConfigError
from asyncvmm.testing.driver import Driver
from tests.support.balloon_guest import ALL, RAM, balloon, counted, driven, statistics, words

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
