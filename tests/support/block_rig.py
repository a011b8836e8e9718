"""A virtio block device on a real file, whose requests wait until a test says."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from asyncvmm.devices.virtio.blk import VirtioBlk
from asyncvmm.devices.virtio.block_io import BlockRequest
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.storage.raw import RawImage
from asyncvmm.storage.work import merged, work_on
from asyncvmm.testing import Driver

IN, OUT, FLUSH, GET_ID, DISCARD, ZERO = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
SECTORS = 64
CONTENT = os.urandom(SECTORS * 512)


class Held:
    """A backend on a real file, which does nothing before it is told to."""

    def __init__(self, image: RawImage) -> None:
        self.image = image
        self.held: list[BlockRequest] = []
        self.abandoned = 0
        self.at_once = False

    def submit(self, requests: Sequence[BlockRequest]) -> None:
        self.held += requests

    def read_now(self, offset: int, size: int) -> memoryview | None:
        room = memoryview(bytearray(size))
        return room if self.at_once and self.image.read_now(offset, [room]) else None

    def abandon(self) -> None:
        self.abandoned += 1

    def finish(self, device: VirtioBlk, count: int | None = None) -> None:
        batch, self.held = self.held[:count], self.held[len(self.held) if count is None else count :]
        for group in merged(batch):
            work_on(self.image, group)
        with device.session() as alive:
            device.complete(batch, alive=alive)


class Rig:
    """A device on a real file of SECTORS sectors, its backend and its driver."""

    def __init__(
        self, path: Path, *, features: int | None = None, indirect: bool = False, read_only: bool = False
    ) -> None:
        path.write_bytes(CONTENT)
        self.path = path
        self.image = RawImage(os.open(path, os.O_RDWR), len(CONTENT))
        self.metrics = BlockMetrics()
        self.device = VirtioBlk(self.image.size, self.metrics, serial="disk-0", read_only=read_only)
        self.backend = self.device.backend = Held(self.image)
        self.driver = Driver(self.device, memory_size=8 << 20, features=features, indirect=indirect)

    def send(self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = ()) -> int:
        head = self.driver.send(0, [struct.pack("<IIQ", kind, 0, sector), *data], [*room, 1])
        self.driver.kick(0)
        return head

    def ask(self, kind: int, sector: int = 0, data: Sequence[bytes] = (), room: Sequence[int] = ()) -> bytes:
        """What the device wrote: data and status."""
        self.send(kind, sector, data, room)
        while self.backend.held:
            self.backend.finish(self.device)
        (used,) = self.driver.used(0)
        return used.data

    def read(self, sector: int, count: int) -> bytes:
        answer = self.ask(IN, sector, room=[count * 512])
        assert answer[-1:] == OK
        return answer[:-1]


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, count, flags)
