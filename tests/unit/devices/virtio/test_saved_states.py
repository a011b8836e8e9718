"""Saved states of any device: what a hostile guest left in them, and what somebody else put there."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from asyncvmm.device_config import RngConfig
from asyncvmm.devices.virtio.registers import (
    QUEUE_NUM,
    QUEUE_READY,
)
from asyncvmm.devices.virtio.rng import VirtioRng
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import EntropyMetrics
from asyncvmm.testing import Driver


def rng() -> VirtioRng:
    return VirtioRng(
        RngConfig(bytes_per_s=0), bytes, EntropyMetrics(), clock_ns=lambda: 0, later=lambda seconds, call: None
    )


@pytest.mark.parametrize("nonsense", [None, 7, 1.5, True, "text", [], [7]])
@pytest.mark.parametrize("place", ["queue", "device"])
def test_a_saved_record_that_is_none_is_refused(place: str, nonsense: object) -> None:
    driver = Driver(rng())
    state: dict[str, Any] = copy.deepcopy(driver.transport.state())
    if place == "queue":
        state["queues"][0] = nonsense
    else:
        state["device"] = nonsense
    with pytest.raises(ConfigError):
        driver.new_transport(rng()).restore(state)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_a_queue_that_is_neither_ready_nor_not_is_refused(value: object) -> None:
    driver = Driver(rng())
    state: dict[str, Any] = copy.deepcopy(driver.transport.state())
    state["queues"][0]["ready"] = value
    with pytest.raises(ConfigError):
        driver.new_transport(rng()).restore(state)


def test_a_queue_size_beyond_reason_does_not_spoil_the_snapshot_as_long_as_the_queue_is_not_ready() -> None:
    driver = Driver(rng())
    driver.write(QUEUE_READY, 0)
    driver.write(QUEUE_NUM, 0xFFFFFFFF)
    state = driver.transport.state()
    transport = driver.new_transport(rng())
    transport.restore(state)
    assert transport.state() == state
    driver.transport = transport
    driver.write(QUEUE_READY, 1)
    assert driver.needs_reset


def test_a_ring_index_that_jumped_does_not_spoil_the_snapshot_but_asks_for_a_reset_once_it_is_seen() -> None:
    driver = Driver(rng())
    driver.queue(0).set_avail_index(0x8000)
    transport = driver.new_transport(rng())
    transport.restore(driver.transport.state())
    driver.transport = transport
    assert not driver.needs_reset
    driver.work()
    assert driver.needs_reset
