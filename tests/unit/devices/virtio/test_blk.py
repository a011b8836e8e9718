from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncvmm.devices.virtio.blk import (
    MOST_DISCARD_SECTORS,
    MOST_ZERO_SECTORS,
    SEG_MAX,
    SIZE_MAX,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VirtioBlk,
)
from asyncvmm.devices.virtio.block_io import Operation
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.testing import Driver
from tests.support.block_rig import (
    CONTENT,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    UNSUPP,
    ZERO,
    Rig,
    segment,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture
def rig(path: Path) -> Iterator[Rig]:
    rig = Rig(path)
    yield rig
    rig.image.close()


# -- configuration space -----------------------------------------------------------------------------------------------


def test_the_configuration_space_is_that_of_the_specification(rig: Rig) -> None:
    config = rig.driver.config(0, 72)
    assert struct.unpack_from("<QIIHBBI", config) == (SECTORS, SIZE_MAX, SEG_MAX, 0, 0, 0, 512)
    assert struct.unpack_from("<BBHIBBH", config, 24) == (3, 0, 1, 0, 1, 0, 1)
    assert struct.unpack_from("<III", config, 36) == (MOST_DISCARD_SECTORS, 16, 8)
    assert struct.unpack_from("<IIB", config, 48) == (MOST_ZERO_SECTORS, 1, 1)
    assert config[57:] == bytes(15)
    assert len(rig.device.config) == 72


def test_a_read_only_disk_offers_nothing_that_writes(path: Path) -> None:
    offered = VirtioBlk(512, BlockMetrics(), read_only=True).features
    assert offered >> VIRTIO_BLK_F_RO & 1
    assert not offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES)


def test_a_disk_without_discard_does_not_offer_it() -> None:
    device = VirtioBlk(512, BlockMetrics(), discard=False)
    assert not device.features >> VIRTIO_BLK_F_DISCARD & 1
    assert device.config[36:48] == bytes(12)


def test_only_the_writeback_field_can_be_written(rig: Rig) -> None:
    before = rig.driver.config(0, 72)
    for offset in range(72):
        if offset != 32:
            rig.driver.write(0x100 + offset, 0xFF, 1)
    rig.driver.write(0x100 + 32, 7, 1)
    rig.driver.write(0x100 + 32, 0, 2)
    assert rig.driver.config(0, 72) == before
    assert rig.metrics.cfg_fails == 73
    rig.driver.write(0x100 + 32, 0, 1)
    assert rig.driver.config(32, 1) == b"\0"


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_read_is_what_is_on_the_disk(rig: Rig, at_once: bool) -> None:
    rig.backend.at_once = at_once
    assert rig.read(3, 5) == CONTENT[3 * 512 : 8 * 512]
    assert (rig.metrics.read_count, rig.metrics.read_bytes) == (1, 5 * 512)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_read_scatters_over_segments_of_any_size(rig: Rig, at_once: bool) -> None:
    rig.backend.at_once = at_once
    answer = rig.ask(IN, 1, room=[1, 510, 513, 512])
    assert answer == CONTENT[512 : 4 * 512] + OK


def test_what_is_written_is_on_the_disk(rig: Rig) -> None:
    assert rig.ask(OUT, 2, [b"a" * 100, b"b" * 412, b"c" * 512]) == OK
    assert rig.path.read_bytes() == CONTENT[:1024] + b"a" * 100 + b"b" * 412 + b"c" * 512 + CONTENT[2048:]
    assert (rig.metrics.write_count, rig.metrics.write_bytes) == (1, 1024)


@pytest.mark.parametrize("cut", [1, 8, 15])
def test_a_header_may_lie_across_segments(rig: Rig, cut: int) -> None:
    header = struct.pack("<IIQ", OUT, 0, 1)
    rig.driver.send(0, [header[:cut], header[cut:] + b"x" * 200, b"y" * 312], [1])
    rig.driver.kick(0)
    rig.backend.finish(rig.device)
    assert rig.driver.used(0)[0].data == OK
    assert rig.read(1, 1) == b"x" * 200 + b"y" * 312


def test_the_status_may_share_a_segment_with_the_data(rig: Rig) -> None:
    for rig.backend.at_once in (True, False):
        rig.driver.send(0, [struct.pack("<IIQ", IN, 0, 0)], [513])
        rig.driver.kick(0)
        if rig.backend.held:
            rig.backend.finish(rig.device)
        assert rig.driver.used(0)[0].data == CONTENT[:512] + OK


def test_an_indirect_chain_of_many_segments_is_one_request(path: Path) -> None:
    rig = Rig(path, indirect=True)
    header = struct.pack("<IIQ", IN, 0, 0)
    rig.driver.send(0, [header], [128] * 60 + [1], indirect=True)
    rig.driver.kick(0)
    rig.backend.finish(rig.device)
    assert rig.driver.used(0)[0].data == CONTENT[: 60 * 128] + OK
    rig.image.close()


def test_get_id_tells_the_serial_in_twenty_bytes(rig: Rig) -> None:
    assert rig.ask(GET_ID, room=[20]) == b"disk-0".ljust(20, b"\0") + OK
    assert rig.ask(GET_ID, room=[19])[-1:] == IOERR


def test_a_flush_comes_back_once_it_is_done(rig: Rig) -> None:
    rig.send(FLUSH)
    assert rig.driver.used(0) == []
    rig.backend.finish(rig.device)
    assert rig.driver.used(0)[0].data == OK
    assert rig.metrics.flush_count == 1


def test_a_flush_is_behind_the_writes_before_it(rig: Rig) -> None:
    rig.send(OUT, 0, [b"1" * 512])
    rig.send(FLUSH)
    rig.send(OUT, 1, [b"2" * 512])
    assert [request.operation for request in rig.backend.held] == [Operation.WRITE, Operation.FLUSH, Operation.WRITE]


def test_zeroes_and_discards_reach_every_range(rig: Rig) -> None:
    assert rig.ask(ZERO, data=[segment(1, 2, 1)]) == OK
    assert rig.ask(ZERO, data=[segment(5, 1)]) == OK
    assert rig.read(0, 7) == CONTENT[:512] + bytes(1024) + CONTENT[1536:2560] + bytes(512) + CONTENT[3072:3584]
    assert rig.ask(DISCARD, data=[segment(8, 8), segment(24, 8)]) == OK
    assert rig.read(16, 8) == CONTENT[16 * 512 : 24 * 512]


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (IN, SECTORS, [], [512], IOERR),
        (IN, SECTORS - 1, [], [1024], IOERR),
        (IN, 2**64 - 1, [], [512], IOERR),
        (IN, 2**55, [], [512], IOERR),
        (IN, 0, [], [511], IOERR),
        (IN, 0, [b"x"], [512], IOERR),
        (OUT, SECTORS, [b"x" * 512], [], IOERR),
        (OUT, 2**64 - 1, [b"x" * 512], [], IOERR),
        (OUT, 0, [b"x" * 513], [], IOERR),
        (OUT, 0, [b"x" * 512], [1], IOERR),
        (GET_ID, 0, [], [], IOERR),
        (DISCARD, 0, [], [], IOERR),
        (DISCARD, 0, [b"x" * 15], [], IOERR),
        (DISCARD, 0, [segment(0, 1)] * 17, [], IOERR),
        (DISCARD, 0, [segment(0, 1, 1)], [], UNSUPP),
        (DISCARD, 0, [segment(SECTORS, 1)], [], IOERR),
        (DISCARD, 0, [segment(2**64 - 1, 2)], [], IOERR),
        (DISCARD, 0, [segment(0, 1), segment(0, SECTORS + 1)], [], IOERR),
        (DISCARD, 0, [segment(0, 1)], [1], IOERR),
        (ZERO, 0, [segment(0, 1, 2)], [], UNSUPP),
        (ZERO, 0, [segment(0, 1), segment(1, 1)], [], IOERR),
        (ZERO, 0, [segment(0, MOST_ZERO_SECTORS + 1)], [], IOERR),
        (2, 0, [], [], UNSUPP),
        (10, 0, [], [512], UNSUPP),
        (14, 0, [segment(0, 1)], [], UNSUPP),
        (2**32 - 1, 0, [b"?" * 700], [3], UNSUPP),
    ],
)
def test_a_request_that_cannot_be_is_answered_and_nothing_happens(
    rig: Rig, kind: int, sector: int, data: list[bytes], room: list[int], status: bytes
) -> None:
    assert rig.ask(kind, sector, data, room)[-1:] == status
    assert rig.path.read_bytes() == CONTENT
    assert rig.metrics.invalid_reqs_count == 1
    assert not rig.driver.needs_reset


@pytest.mark.parametrize(("readable", "writable"), [([b"short"], [1]), ([], [513]), ([bytes(16)], [])])
def test_a_chain_without_room_for_header_or_status_is_given_back_unanswered(
    rig: Rig, readable: list[bytes], writable: list[int]
) -> None:
    head = rig.driver.send(0, readable, writable)
    rig.driver.kick(0)
    (used,) = rig.driver.used(0)
    assert (used.head, used.written) == (head, 0)
    assert rig.metrics.invalid_reqs_count == 1


def test_requests_beyond_what_was_offered_are_refused_however_they_are_made(path: Path) -> None:
    rig = Rig(path, indirect=True)
    rig.device.size = 1 << 40
    rig.driver.send(0, [struct.pack("<IIQ", IN, 0, 0)], [1], indirect=True)
    table = rig.driver.queue(0)
    address = 1 << 19
    entries = [(address, 16, 1)] + [(0, 1 << 20, 3)] * 17 + [(1 << 20, 1, 2)]
    blob = b"".join(struct.pack("<QIHH", *entry, index + 1) for index, entry in enumerate(entries))
    rig.driver.memory[address : address + 16] = struct.pack("<IIQ", IN, 0, 0)
    rig.driver.memory[address + 64 : address + 64 + len(blob)] = blob
    table.set_descriptor(0, address + 64, len(blob), 4, 0)
    rig.driver.kick(0)
    assert rig.backend.held == []
    assert rig.metrics.invalid_reqs_count == 1
    rig.image.close()


@pytest.mark.parametrize("kind", [OUT, DISCARD, ZERO])
def test_a_read_only_disk_is_not_written(path: Path, kind: int) -> None:
    rig = Rig(path, read_only=True)
    assert rig.ask(kind, data=[segment(0, 1) if kind != OUT else b"x" * 512])[-1:] in (IOERR, UNSUPP)
    assert rig.ask(OUT, data=[b"x" * 512]) == IOERR
    assert rig.path.read_bytes() == CONTENT
    rig.image.close()


def test_what_was_not_negotiated_is_unsupported(path: Path) -> None:
    rig = Rig(path, features=0)
    assert rig.ask(DISCARD, data=[segment(0, 1)]) == UNSUPP
    assert rig.ask(ZERO, data=[segment(0, 1)]) == UNSUPP
    rig.image.close()


def test_a_failing_disk_fails_the_request_and_not_the_device(rig: Rig) -> None:
    os.truncate(rig.path, 512)
    assert rig.ask(IN, 8, room=[512])[-1:] == IOERR
    assert rig.metrics.execute_fails == 1
    assert rig.read(0, 1) == CONTENT[:512]


def test_one_failing_read_does_not_fail_its_neighbours(rig: Rig) -> None:
    os.truncate(rig.path, 1024)
    for sector in range(4):
        rig.send(IN, sector, room=[512])
    rig.backend.finish(rig.device)
    assert [used.data[-1:] for used in rig.driver.used(0)] == [OK, OK, IOERR, IOERR]


def test_without_a_backend_every_request_fails() -> None:
    driver = Driver(VirtioBlk(512, BlockMetrics()))
    for kind in (IN, FLUSH):
        room = [512, 1] if kind == IN else [1]
        assert driver.request(0, [struct.pack("<IIQ", kind, 0, 0)], room)[-1:] == IOERR


def test_a_broken_ring_asks_for_a_reset_and_the_requests_before_it_are_carried_out(rig: Rig) -> None:
    rig.driver.send(0, [struct.pack("<IIQ", OUT, 0, 0), b"w" * 512], [1])
    rig.driver.queue(0).put_available(63)
    rig.driver.queue(0).set_descriptor(63, 0, 0, 0, 0)
    rig.driver.kick(0)
    assert rig.driver.needs_reset
    assert rig.metrics.event_fails == 1
    rig.backend.finish(rig.device)
    assert rig.device.drain()
    assert rig.driver.used(0) == []


# -- cache mode --------------------------------------------------------------------------------------------------------


def test_writes_are_synchronous_where_the_driver_will_not_flush(path: Path) -> None:
    flush, wce = 1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE
    for features, writeback, sync in ((0, 1, True), (flush, 1, False), (flush | wce, 1, False), (flush | wce, 0, True)):
        rig = Rig(path, features=features)
        rig.driver.write(0x100 + 32, writeback, 1)
        rig.send(OUT, 0, [b"x" * 512])
        assert rig.backend.held[0].sync is sync
        rig.image.close()


def test_a_reset_takes_the_drivers_cache_mode_back(rig: Rig) -> None:
    rig.driver.write(0x100 + 32, 0, 1)
    assert rig.device.writes_through
    rig.driver.reset()
    assert rig.driver.config(32, 1) == b"\1"
