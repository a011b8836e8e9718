"""The balloon as a program sees it, over a real device with a driver that behaves as Linux does."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from asyncvmm.balloon import Balloon, DeviceBalloon
from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.virtio.balloon.device import (
    ACTUAL,
    CMD_ID_STOP,
    DEFLATE,
    FREE_PAGE,
    FREE_PAGE_HINT_CMD_ID,
    INFLATE,
    NUM_PAGES,
    STATS,
    VirtioBalloon,
)
from asyncvmm.devices.virtio.registers import (
    CONFIG,
)
from asyncvmm.errors import ConfigError, GuestError, StateError
from asyncvmm.metrics.groups import BalloonMetrics
from asyncvmm.testing.driver import Driver

pytestmark = pytest.mark.anyio

MEMORY_MIB = 10
RAM = MEMORY_MIB << 20
AT_ONCE = 256


class Host:
    """Counts the bytes given back."""

    released = 0

    def release(self, ranges: list[tuple[int, int]]) -> int:
        size = sum(size for _, size in ranges)
        self.released += size
        return size


class Guest:
    """A driver that follows the target as Linux does, ``spare`` pages at the most."""

    def __init__(self, config: BalloonConfig, spare: int = RAM // 4096) -> None:
        self.host = Host()
        self.device = VirtioBalloon(config, [(0, RAM)], self.host, BalloonMetrics())
        self.driver = Driver(self.device, memory_size=RAM)
        self.spare = spare
        self.pages = 0
        self.answers = True
        self._command = 0
        self._give_statistics()

    def word(self, offset: int) -> int:
        return int.from_bytes(self.driver.config(offset, 4), "little")

    async def run(self) -> None:
        while True:
            if self.driver.acknowledge() and self.answers:
                self.look()
            elif self.pages != self.word(NUM_PAGES):
                self.step()
            await anyio.sleep(0.001)

    def look(self) -> None:
        if self.driver.used(STATS):
            self._give_statistics()
        command = self.word(FREE_PAGE_HINT_CMD_ID)
        if command not in (0, 1, self._command):
            self._command = command
            self.driver.request(FREE_PAGE, [struct.pack("<I", command)])
            self.driver.request(FREE_PAGE, writable=[1 << 20])
            self.driver.request(FREE_PAGE, [struct.pack("<I", CMD_ID_STOP)])

    def step(self) -> None:
        target = min(self.word(NUM_PAGES), self.spare)
        before, self.pages = self.pages, max(self.pages - AT_ONCE, min(target, self.pages + AT_ONCE))
        pfns = range(min(before, self.pages), max(before, self.pages))
        if pfns:
            queue = INFLATE if self.pages > before else DEFLATE
            self.driver.request(queue, [struct.pack(f"<{len(pfns)}I", *pfns)])
        self.driver.write(CONFIG + ACTUAL, self.pages)

    def _give_statistics(self) -> None:
        self.driver.send(STATS, [struct.pack("<HQ", 4, (RAM // 4096 - self.pages) * 4096)])
        self.driver.kick(STATS)


@asynccontextmanager
async def running(guest: Guest, answer_s: float = 5) -> AsyncIterator[Balloon]:
    backend = DeviceBalloon(guest.device, answer_s=answer_s)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guest.run)
        yield Balloon(lambda: backend, MEMORY_MIB)
        tasks.cancel_scope.cancel()


async def test_set_returns_when_the_guest_has_reached_it() -> None:
    guest = Guest(BalloonConfig())
    async with running(guest) as balloon:
        assert await balloon.set(4) == 4
        assert guest.host.released == 4 << 20
        assert await balloon.set(1) == 1
    assert guest.device.metrics.inflate_count == 4
    assert guest.device.metrics.deflate_count == 3


async def test_a_guest_that_can_give_no_more_is_not_waited_for() -> None:
    guest = Guest(BalloonConfig(), spare=512)
    async with running(guest) as balloon:
        assert await balloon.set(8, stall_s=0.1) == 2
        assert guest.device.target_pages == 8 * 256, "it may go on trying"


async def test_a_newer_target_ends_the_wait_for_an_older_one() -> None:
    guest = Guest(BalloonConfig(), spare=512)
    reached: list[int] = []
    async with running(guest) as balloon, anyio.create_task_group() as tasks:

        async def ask_for_too_much() -> None:
            reached.append(await balloon.set(8, stall_s=60))

        tasks.start_soon(ask_for_too_much)
        await anyio.sleep(0.05)
        assert await balloon.set(1) == 1
    assert len(reached) == 1


@pytest.mark.parametrize("mib", [-1, MEMORY_MIB + 1, 1.5, True, None])
async def test_a_size_that_is_none_of_this_guest_is_refused(mib: int) -> None:
    async with running(Guest(BalloonConfig())) as balloon:
        with pytest.raises(ConfigError, match="0 to 10 MiB"):
            await balloon.set(mib)


async def test_without_a_balloon_every_call_says_so() -> None:
    balloon = Balloon(lambda: None, MEMORY_MIB)
    for call in (balloon.set(1), balloon.stats(), balloon.hint_free_pages()):
        with pytest.raises(StateError, match="no balloon"):
            await call


async def test_without_a_driver_every_call_says_so() -> None:
    guest = Guest(BalloonConfig())
    async with running(guest) as balloon:
        guest.answers = False
        guest.driver.reset()
        for call in (balloon.set(1), balloon.stats(), balloon.hint_free_pages()):
            with pytest.raises(StateError, match="no driver"):
                await call


async def test_statistics_are_fresh() -> None:
    async with running(Guest(BalloonConfig())) as balloon:
        await balloon.set(1)
        stats = await balloon.stats()
        assert stats.free_memory == (MEMORY_MIB - 1) << 20
        assert (stats.target_mib, stats.actual_mib) == (1, 1)
        assert balloon.latest == stats
        await balloon.set(2)
        assert (await balloon.stats()).free_memory == (MEMORY_MIB - 2) << 20


async def test_many_may_ask_for_statistics_at_once() -> None:
    async with running(Guest(BalloonConfig())) as balloon, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(balloon.stats)


async def test_a_driver_without_statistics_tells_the_size_alone() -> None:
    device = VirtioBalloon(BalloonConfig(), [(0, RAM)], Host(), BalloonMetrics())
    Driver(device, memory_size=RAM, features=0)
    stats = await DeviceBalloon(device).stats()
    assert stats.to_dict() == {"target_mib": 0, "actual_mib": 0, "target_pages": 0, "actual_pages": 0}


async def test_a_guest_that_does_not_answer_is_an_error() -> None:
    guest = Guest(BalloonConfig(free_page_hinting=True))
    guest.answers = False
    async with running(guest, answer_s=0.05) as balloon:
        for call in (balloon.stats(), balloon.hint_free_pages()):
            with pytest.raises(GuestError, match="an answer within") as silence:
                await call
            assert silence.value.reason == "timeout"


async def test_polling_keeps_the_newest_statistics_and_outlives_a_silent_guest() -> None:
    guest = Guest(BalloonConfig())
    guest.answers = False
    async with running(guest, answer_s=0.02) as balloon, anyio.create_task_group() as tasks:
        tasks.start_soon(balloon.poll, 0.01)
        await anyio.sleep(0.05)
        assert balloon.latest is None
        guest.answers = True
        guest.look()
        for _ in range(500):
            await anyio.sleep(0.01)
            if balloon.latest is not None:
                break
        else:
            pytest.fail("nothing came")
        tasks.cancel_scope.cancel()


async def test_free_pages_are_taken_when_asked_for() -> None:
    guest = Guest(BalloonConfig(free_page_hinting=True))
    async with running(guest) as balloon:
        freed = await balloon.hint_free_pages()
        assert freed >= (1 << 20) - 4096
        assert freed == guest.host.released == guest.device.metrics.free_page_hint_freed
        assert await balloon.hint_free_pages() == freed


async def test_hinting_that_was_not_asked_for_is_refused() -> None:
    async with running(Guest(BalloonConfig())) as balloon:
        with pytest.raises(StateError, match="not negotiated"):
            await balloon.hint_free_pages()
