"""The balloon under attack: it may give back what was offered, and nothing else."""

from __future__ import annotations

import struct

from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.virtio.balloon import device as balloon
from asyncvmm.devices.virtio.balloon.device import (
    DEFLATE,
    FREE_PAGE,
    INFLATE,
    REPORTING,
    STATS,
    VirtioBalloon,
)
from asyncvmm.devices.virtio.balloon.pages import MOST_PFNS, PAGE_BYTES
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.metrics.groups import BalloonMetrics
from asyncvmm.testing import Driver
from tests.fuzz.driver import SHARE
from tests.fuzz.guest import play
from tests.fuzz.limits import lowered
from tests.fuzz.memory import HIGH, HIGH_BYTES
from tests.fuzz.reference import Range
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

MOST_RELEASED = 4 * PAGE_BYTES
_QUEUES = 5
_RAM = ((0, SHARE * _QUEUES), (HIGH, HIGH + HIGH_BYTES))


class BalloonTarget(Target):
    """A balloon with all its features; pages that it gives back are zeros at once."""

    def __init__(self) -> None:
        self.fails = False
        self.remembered: dict[int, tuple[Chain, set[int]]] = {}

    def make(self, script: Script) -> VirtioBalloon:
        """See Target."""
        config = BalloonConfig(mib=1, free_page_hinting=True)
        self.device = VirtioBalloon(config, _RAM, self, BalloonMetrics())
        return self.device

    def release(self, ranges: list[Range]) -> int:
        """See BalloonBackend: what is given back was named by the driver, and is whole pages of RAM."""
        assert ranges
        assert sum(size for _, size in ranges) <= MOST_RELEASED, "more than a turn's work"
        end, named = 0, self._named()
        for address, size in ranges:
            assert address % PAGE_BYTES == size % PAGE_BYTES == 0
            assert size > 0
            assert address >= end, "pages given back twice"
            end = address + size
            assert any(first <= address and end <= last for first, last in _RAM), "no RAM"
            assert not self.watch.calm or _pages(address, size) <= named, "pages that nobody has named"
        if self.fails:
            return 0
        for address, size in ranges:
            self.watch.allowed.append((address, size))
            self.view.mark(address, size)
            for region in self.view.regions:
                if (part := region.part(address, size)) is not None:
                    region.memory[part] = bytes(part.stop - part.start)
        return sum(size for _, size in ranges)

    def _named(self) -> set[int]:
        """The numbers of all pages that lie within buffers which the device holds, or that are written in them."""
        named = set()
        chains = {key: chain for queue in self.watch.queues for key, chain in queue.out.items()}
        self.remembered = {key: entry for key, entry in self.remembered.items() if chains.get(key) is entry[0]}
        for key, chain in chains.items():
            for address, view in zip(chain.writable_at, chain.writable, strict=True):
                named |= _pages(address, len(view))
            if key not in self.remembered:  # later there may be something else
                self.remembered[key] = (chain, _pfns(chain))
            named |= self.remembered[key][1]
        return named

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        if index in (INFLATE, DEFLATE):
            pfns = [script.byte() % 12 if script.byte() % 8 else script.number(4) for _ in range(script.byte() % 8)]
            return [struct.pack(f"<{len(pfns)}I", *pfns) or b"\0"], []
        if index == STATS:
            return [struct.pack("<HQ", script.byte() % 16, script.number(4)) * (script.byte() % 4) or b"\0"], []
        asked = self.device._word(balloon.FREE_PAGE_HINT_CMD_ID)
        command = struct.pack("<I", asked if script.flag() else script.byte() % 4)
        writable = [script.pick((PAGE_BYTES, 2 * PAGE_BYTES, 0x1800, 16)) for _ in range(script.byte() % 3)]
        readable = [command] if index == FREE_PAGE and (script.flag() or not writable) else []
        return readable, writable or [16] * (index == REPORTING)

    def event(self, script: Script) -> None:
        """The host wants something."""
        kind = script.byte() % 5
        with self.device.session() as alive:
            if kind == 0:
                self.fails = script.flag()
            elif kind == 1:
                self.device.set_target_pages(script.number(4))
            elif alive and kind == 2:
                self.device.start_hinting()
            elif alive:
                self.device.request_stats()
        self.device.stats().to_dict()

    def check(self) -> None:
        """See Target."""
        device = self.device
        assert len(device._releases) <= 3
        assert len(device._statistics) <= 10
        assert device.actual_pages >= 0

    def may_wait(self, index: int) -> bool:
        """A queue whose feature was not negotiated is nobody's."""
        return index not in self.device._parts

    def serves(self, driver: Driver) -> None:
        """See Target."""
        self.fails = False
        page = SHARE // PAGE_BYTES * DEFLATE + 1
        driver.memory[page * PAGE_BYTES] = 0xFF
        self.view.sync()
        driver.send(INFLATE, [struct.pack("<I", page)])
        self.watch.calm = False
        driver.kick(INFLATE)
        assert len(driver.used(INFLATE)) == 1
        assert driver.memory[page * PAGE_BYTES] == 0


def _pages(address: int, size: int) -> set[int]:
    return set(range(address // PAGE_BYTES, -(-(address + size) // PAGE_BYTES)))


def _pfns(chain: Chain) -> set[int]:
    if chain.readable_size % 4 or chain.readable_size > 4 * MOST_PFNS:
        return set()
    return {pfn for (pfn,) in struct.iter_unpack("<I", chain.read())}


def run(data: bytes) -> None:
    """One script."""
    with lowered(balloon, MOST_RELEASED=MOST_RELEASED):
        play(BalloonTarget(), data)
