"""The block device's bounds: resets, drivers that fill it, kicks for nothing, saved states, noise."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.blk import MOST_BYTES_OUT, MOST_REQUESTS_OUT, VirtioBlk
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.storage.raw import RawImage
from asyncvmm.testing import Driver
from tests.support.block_rig import CONTENT, FLUSH, IN, OK, OUT, SECTORS, Held, Rig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture
def rig(path: Path) -> Iterator[Rig]:
    rig = Rig(path)
    yield rig
    rig.image.close()


def test_after_a_reset_nothing_of_the_former_driver_is_answered_or_written(rig: Rig) -> None:
    rig.send(IN, 0, room=[512])
    before = rig.backend.held
    rig.driver.reset()
    assert rig.backend.abandoned == 1
    rig.driver.start()
    memory = bytes(rig.driver.memory)
    rig.backend.finish(rig.device)
    assert before[0].result == CONTENT[:512]
    assert bytes(rig.driver.memory) == memory
    assert rig.read(1, 1) == CONTENT[512:1024]


def test_a_stopped_queue_is_not_answered_either(rig: Rig) -> None:
    rig.send(IN, 0, room=[512])
    rig.driver.write(0x30, 0)
    rig.driver.write(0x44, 0)
    memory = bytes(rig.driver.memory)
    rig.backend.finish(rig.device)
    assert bytes(rig.driver.memory) == memory
    assert rig.device.drain()


def test_a_driver_that_resets_again_and_again_does_not_fill_the_backend(rig: Rig) -> None:
    for _ in range(20):
        for sector in range(20):
            rig.send(OUT, sector, [b"x" * 512])
        rig.driver.reset()
        rig.driver.start()
    assert len(rig.backend.held) == MOST_REQUESTS_OUT
    rig.send(OUT, 0, [b"y" * 512])
    assert rig.driver.used(0) == []
    while rig.backend.held:
        rig.backend.finish(rig.device, 16)
    assert [used.data for used in rig.driver.used(0)] == [OK]
    assert rig.device.drain()


def test_the_backend_has_a_bounded_number_of_bytes(path: Path) -> None:
    rig = Rig(path)
    rig.device.size = 1 << 40
    queue = rig.driver.queue(0)
    rig.driver.memory[1 << 20 : (1 << 20) + 16] = struct.pack("<IIQ", IN, 0, 0)
    for head in range(0, 60, 3):
        queue.set_descriptor(head, 1 << 20, 16, 1, head + 1)
        queue.set_descriptor(head + 1, 2 << 20, 4 << 20, 3, head + 2)
        queue.set_descriptor(head + 2, 1 << 20, 1, 2, 0)
        queue.put_available(head)
    rig.driver.kick(0)
    assert sum(request.size for request in rig.backend.held) == MOST_BYTES_OUT
    assert rig.metrics.io_engine_throttled_events == 1
    assert not rig.device.drain()
    seen = 0
    while rig.backend.held:
        batch, rig.backend.held = rig.backend.held[:1], rig.backend.held[1:]
        for request in batch:
            request.failed = "not read"
        with rig.device.session() as alive:
            rig.device.complete(batch, alive=alive)
        seen += 1
    assert seen == 20
    assert rig.device.drain()
    rig.image.close()


def test_one_turn_takes_a_bounded_number_of_requests(rig: Rig) -> None:
    rig.driver.reset()
    rig.driver = Driver(rig.device, memory_size=8 << 20, queue_size=256)
    for _ in range(80):
        rig.driver.send(0, [struct.pack("<IIQ", FLUSH, 0, 0)], [1])
    assert rig.driver.transport.kick(0)
    assert len(rig.backend.held) == 64
    assert not rig.driver.transport.kick(0)
    assert len(rig.backend.held) == 80
    assert (rig.metrics.queue_event_count, rig.metrics.remaining_reqs_count) == (1, 1)


def test_one_turn_reads_a_bounded_number_of_bytes_at_once(rig: Rig) -> None:
    os.truncate(rig.path, 4 << 20)
    rig.device.size = 4 << 20
    rig.backend.at_once = True
    rig.image.read(0, 4 << 20)
    for _ in range(4):
        rig.driver.send(0, [struct.pack("<IIQ", IN, 0, 0)], [600 << 10, 1])
    assert rig.driver.transport.kick(0) is False
    assert len(rig.driver.used(0)) == 1
    assert len(rig.backend.held) == 3


def test_a_kick_for_nothing_is_counted(rig: Rig) -> None:
    rig.driver.kick(0)
    assert (rig.metrics.queue_event_count, rig.metrics.no_avail_buffer) == (1, 1)


def test_latencies_are_those_of_the_clock(path: Path) -> None:
    now = iter(range(0, 10**9, 5000))
    metrics = BlockMetrics()
    device = VirtioBlk(SECTORS * 512, metrics, clock=lambda: next(now))
    path.write_bytes(CONTENT)
    image = RawImage(os.open(path, os.O_RDWR), len(CONTENT))
    backend = device.backend = Held(image)
    driver = Driver(device)
    driver.send(0, [struct.pack("<IIQ", OUT, 0, 0), b"x" * 512], [1])
    driver.kick(0)
    backend.finish(device)
    assert metrics.write_agg.sum_us == 5
    assert metrics.read_agg.sum_us == 0
    image.close()


def test_a_device_is_drained_once_everything_came_back(rig: Rig) -> None:
    assert rig.device.drain()
    rig.send(FLUSH)
    assert not rig.device.drain()
    rig.backend.finish(rig.device)
    assert rig.device.drain()


def test_a_restored_device_is_the_one_that_was_saved(rig: Rig) -> None:
    rig.driver.write(0x100 + 32, 0, 1)
    state = rig.device.state()
    other = VirtioBlk(rig.device.size, BlockMetrics())
    other.restore(state)
    assert other.config == rig.device.config
    assert other.state() == state


@pytest.mark.parametrize(
    "change", [{"size": 512}, {"size": -1}, {"size": "x"}, {"read_only": True}, {"writeback": 1}, {"size": None}]
)
def test_a_state_of_another_disk_is_refused(rig: Rig, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="saved"):
        VirtioBlk(rig.device.size, BlockMetrics()).restore(rig.device.state() | change)


@given(
    st.lists(
        st.tuples(st.lists(st.binary(min_size=1, max_size=40), max_size=4), st.lists(st.integers(1, 600), max_size=4)),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_no_noise_gets_through(
    tmp_path_factory: pytest.TempPathFactory, chains: list[tuple[list[bytes], list[int]]], at_once: bool
) -> None:
    rig = Rig(tmp_path_factory.getbasetemp() / "noise.img")
    rig.backend.at_once = at_once
    sent = []
    for readable, writable in chains:
        if readable or writable:
            sent.append(rig.driver.send(0, readable, writable))
    rig.driver.kick(0)
    while rig.backend.held:
        rig.backend.finish(rig.device)
    assert sorted(used.head for used in rig.driver.used(0)) == sorted(sent)
    assert not rig.driver.needs_reset
    assert rig.device.drain()
    rig.image.close()
