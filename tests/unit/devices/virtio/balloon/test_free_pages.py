"""Free pages, reported and hinted: given back where they are RAM and the command is the one under way."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.balloon.device import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    FREE_PAGE,
    FREE_PAGE_HINT_CMD_ID,
    REPORTING,
    VirtioBalloon,
)
from asyncvmm.devices.virtio.balloon.pages import PAGE_BYTES
from asyncvmm.devices.virtio.queue import DESC_F_WRITE
from asyncvmm.testing.driver import Driver
from tests.support.balloon_guest import RAM, counted, driven, words


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
