"""The block device under attack: its disk is slow, out of order, and fails now and then."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from asyncvmm.devices.virtio import blk
from asyncvmm.devices.virtio.blk import SECTOR, VirtioBlk
from asyncvmm.devices.virtio.block_io import BlockRequest, Operation
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.limits import lowered
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

SECTORS = 16
_KINDS = (0, 1, 4, 8, 11, 13, 2, 0xFFFFFFFF)
_DISK = bytes(place // SECTOR for place in range(SECTORS * SECTOR))


class SlowDisk:
    """See BlockBackend; it checks whatever it is asked."""

    def __init__(self, device: VirtioBlk) -> None:
        self.device = device
        self.waiting: list[BlockRequest] = []
        self.quick = self.fails = False

    def submit(self, requests: Sequence[BlockRequest]) -> None:
        """See BlockBackend."""
        for request in requests:
            self._check(request)
        self.waiting += requests

    def read_now(self, offset: int, size: int) -> memoryview | None:
        """See BlockBackend."""
        self._check_range(offset, size)
        return memoryview(_DISK)[offset : offset + size] if self.quick else None

    def abandon(self) -> None:
        """See BlockBackend."""
        for request in self.waiting:
            request.failed = "abandoned"

    def finish(self, place: int, count: int) -> None:
        """Some requests come back."""
        done, self.waiting[place : place + count] = self.waiting[place : place + count], []
        for request in done:
            if self.fails and request.operation is not Operation.FLUSH:
                request.failed = "no such luck"
            elif request.operation is Operation.READ:
                request.result = _DISK[request.offset : request.offset + request.size]
            elif request.operation is Operation.WRITE:
                assert len(b"".join(request.views)) == request.size
        with self.device.session() as alive:
            self.device.complete(done, alive=alive)

    def _check(self, request: BlockRequest) -> None:
        changes = request.operation not in (Operation.READ, Operation.FLUSH)
        assert not (changes and self.device.read_only), "a disk that cannot be written"
        self._check_range(request.offset, request.size)
        assert sum(map(len, request.views)) == (request.size if request.operation is Operation.WRITE else 0)
        for offset, size, _ in request.ranges:
            self._check_range(offset, size)

    def _check_range(self, offset: int, size: int) -> None:
        assert offset % SECTOR == 0
        assert size % SECTOR == 0
        assert 0 <= offset <= offset + size <= len(_DISK)


class BlkTarget(Target):
    """A disk of a few sectors, with room for few requests at a time."""

    most_pops = 64

    def __init__(self) -> None:
        self.read_only: bool | None = None

    def make(self, script: Script) -> VirtioBlk:
        """See Target."""
        if self.read_only is None:
            self.read_only = script.byte() % 4 == 0
        self.device = VirtioBlk(len(_DISK), BlockMetrics(), serial="fuzz", read_only=self.read_only, clock=lambda: 0)
        self.device.backend = self.disk = SlowDisk(self.device)
        return self.device

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        kind = script.pick(_KINDS)
        sector = script.byte() % (SECTORS + 1) if script.byte() % 8 else script.number(8)
        header = struct.pack("<IIQ", kind, 0, sector)
        readable, writable = [header], [1]
        size = SECTOR * (script.byte() % 4) + (script.byte() if script.byte() % 16 == 0 else 0)
        if kind == 0 and size:
            writable.insert(0, size)
        elif kind == 1 and size:
            readable.append(b"\x55" * size)
        elif kind == 8:
            writable.insert(0, script.pick((20, 20, 19, 64)))
        elif kind in (11, 13):
            readable += [self._segment(script) for _ in range(1 + script.byte() % 3)]
        return self._split(script, readable), writable

    def _segment(self, script: Script) -> bytes:
        sector = script.byte() % (SECTORS + 1) if script.byte() % 8 else script.number(8)
        return struct.pack("<QII", sector, script.byte() if script.byte() % 8 else script.number(4), script.byte() & 1)

    def _split(self, script: Script, readable: list[bytes]) -> list[bytes]:
        """The same bytes, cut differently: a device must not mind."""
        if script.byte() % 4:
            return readable
        data = b"".join(readable)
        cut = 1 + script.byte() % max(1, len(data) - 1)
        return [part for part in (data[:cut], data[cut:]) if part]

    def event(self, script: Script) -> None:
        """Requests come back, or the disk changes its ways."""
        kind = script.byte() % 4
        if kind == 0:
            self.disk.quick, self.disk.fails = script.flag(), script.flag()
        elif self.disk.waiting:
            self.disk.finish(script.byte() % len(self.disk.waiting), 1 + script.byte() % 8)

    def settle(self) -> None:
        """See Target."""
        while self.disk.waiting:
            self.disk.finish(0, len(self.disk.waiting))

    def check(self) -> None:
        """What is out and what waits is bounded, and nothing is forgotten."""
        device, waiting = self.device, self.disk.waiting
        assert len(waiting) <= blk.MOST_REQUESTS_OUT
        assert len(waiting) <= 1 or sum(request.size for request in waiting) <= blk.MOST_BYTES_OUT
        assert len(device._waiting) <= device.queues[0].max_size
        assert device._requests_out == len(waiting)
        if device._waiting:
            assert waiting, "requests wait, and nothing will come back that starts them"

    def serves(self, driver: Driver) -> None:
        """See Target."""
        self.disk.fails = False
        self.disk.quick = True
        header = struct.pack("<IIQ", 0, 0, 3)
        assert driver.request(0, [header], [SECTOR, 1]) == bytes((3,)) * SECTOR + b"\0"
        driver.send(0, [struct.pack("<IIQ", 4, 0, 0)], [1])
        driver.kick(0)
        self.settle()
        assert [used.data for used in driver.used(0)] == [b"\0"]


def run(data: bytes) -> None:
    """One script."""
    with lowered(blk, MOST_REQUESTS_OUT=4, MOST_BYTES_OUT=4 * SECTOR):
        play(BlkTarget(), data)
