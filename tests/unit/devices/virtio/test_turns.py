"""The longest chains a guest can make: each device lets go of the loop after a bounded number of descriptors."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, RngConfig
from asyncvmm.devices.virtio.balloon.device import DEFLATE, INFLATE, STATS, VirtioBalloon
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, VirtioConsole
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESCRIPTORS_A_TURN,
    MOST_DESCRIPTORS,
)
from asyncvmm.devices.virtio.rng import VirtioRng
from asyncvmm.devices.virtio.vsock.device import TX, VirtioVsock
from asyncvmm.metrics.groups import BalloonMetrics, ConsoleMetrics, EntropyMetrics, VsockMetrics
from asyncvmm.testing import Driver

RAM = 1 << 20


class Nowhere:
    def release(self, ranges: list[tuple[int, int]]) -> int:
        return sum(size for _, size in ranges)


def rng() -> VirtioRng:
    return VirtioRng(
        RngConfig(bytes_per_s=0), bytes, EntropyMetrics(), clock_ns=lambda: 0, later=lambda seconds, call: None
    )


def balloon() -> VirtioBalloon:
    return VirtioBalloon(BalloonConfig(), ((0, RAM),), Nowhere(), BalloonMetrics())


def console() -> VirtioConsole:
    return VirtioConsole(ConsoleConfig(ports=("data",)), ConsoleMetrics())


def offer_long_chains(driver: Driver, index: int, *, writable: bool) -> None:
    queue = driver.queue(index)
    table, kind = RAM - 16 * MOST_DESCRIPTORS, DESC_F_WRITE * writable
    for place in range(MOST_DESCRIPTORS):
        flags = kind | DESC_F_NEXT * (place < MOST_DESCRIPTORS - 1)
        struct.pack_into("<QIHH", driver.memory, table + 16 * place, table - 64, 1, flags, place + 1)
    queue.set_descriptor(0, table, 16 * MOST_DESCRIPTORS, DESC_F_INDIRECT, 0)
    for _ in range(queue.size):
        queue.put_available(0)


def walked(device: VirtioDevice) -> int:
    return sum(queue.walked for queue in device.queues)


@pytest.mark.parametrize(
    ("make", "index", "writable"),
    [
        (rng, 0, True),
        (balloon, INFLATE, False),
        (balloon, DEFLATE, False),
        (balloon, STATS, False),
        (console, 1, False),
        (console, CONTROL_TRANSMIT, False),
        (lambda: VirtioVsock(3, VsockMetrics()), TX, False),
    ],
)
def test_a_turn_ends_whatever_the_chains_are_made_of(
    make: Callable[[], VirtioDevice], index: int, writable: bool
) -> None:
    device = make()
    driver = Driver(device, memory_size=RAM, indirect=True)
    offer_long_chains(driver, index, writable=writable)
    turns, more = 0, True
    while more:
        before = walked(device)
        more = driver.transport.kick(index)
        assert walked(device) - before < DESCRIPTORS_A_TURN + MOST_DESCRIPTORS
        turns += 1
    assert walked(device) == driver.queue(index).size * MOST_DESCRIPTORS
    assert turns >= driver.queue(index).size


def test_control_messages_for_buffers_of_many_parts_take_several_turns() -> None:
    device = console()
    driver = Driver(device, memory_size=RAM, indirect=True)
    for _ in range(4):
        driver.send(CONTROL_TRANSMIT, [bytes((0, 0, 0, 0, 0, 0, 1, 0))])
    offer_long_chains(driver, CONTROL_RECEIVE, writable=True)
    more = True
    while more:
        before = walked(device)
        more = driver.transport.kick(CONTROL_TRANSMIT)
        assert walked(device) - before < 2 * (DESCRIPTORS_A_TURN + MOST_DESCRIPTORS)
    assert driver.queue(CONTROL_RECEIVE).used_index == 8
