"""A driver of a disk that knows what it wrote and what was answered."""

from __future__ import annotations

import struct
from typing import Any

from asyncvmm.devices.virtio.blk import SECTOR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from tests.support.device_rig import SlotDriver, until

SECTORS = 2048
MOST_OPEN = 20
"""Requests at a time: of three descriptors each, in a queue of 64."""

HEADER = struct.Struct("<IIQ")


def content(number: int) -> bytes:
    return struct.pack("<Q", number) * (SECTOR // 8)


class Writer:
    """Writes sector after sector, each with its own number in it, and sees that each is answered once."""

    def __init__(self, driver: SlotDriver) -> None:
        self.driver = driver
        self.next = 0
        self.open: dict[int, int] = {}
        self.answered: list[int] = []

    def moved(self, driver: SlotDriver) -> Writer:
        twin = Writer(driver)
        twin.next, twin.open, twin.answered = self.next, dict(self.open), list(self.answered)
        return twin

    def submit(self, count: int, *, kick: bool = True) -> None:
        for _ in range(min(count, MOST_OPEN - len(self.open))):
            header = HEADER.pack(VIRTIO_BLK_T_OUT, 0, self.next % SECTORS)
            head = self.driver.send(0, [header, content(self.next)], [1])
            assert head not in self.open
            self.open[head] = self.next
            self.next += 1
        if kick:
            self.driver.ring(0)

    def reap(self) -> None:
        for used in self.driver.used(0):
            number = self.open.pop(used.head)  # a KeyError: answered twice, or never asked for
            assert used.data == b"\0"
            self.answered.append(number)

    async def finish(self) -> None:
        """Until everything is answered, then see that it is on the disk."""

        def done() -> bool:
            self.reap()
            return not self.open

        await until(done)
        assert sorted(self.answered) == list(range(self.next))
        for number in range(max(0, self.next - SECTORS), self.next):
            header = HEADER.pack(VIRTIO_BLK_T_IN, 0, number % SECTORS)
            self.driver.send(0, [header], [SECTOR, 1])
            self.driver.ring(0)
            found: list[Any] = []
            await until(lambda found=found: found.extend(self.driver.used(0)) or found)
            assert found[0].data == content(number) + b"\0"
