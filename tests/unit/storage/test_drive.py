"""A device, its disk and the loop, all real: only the guest is a test's driver."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from asyncvmm.device_config import CacheMode, DriveConfig
from asyncvmm.devices.virtio.blk import VirtioBlk
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.storage.disk import open_disk
from asyncvmm.storage.drive import BlkShell
from asyncvmm.storage.overlay import make_overlay
from asyncvmm.testing import Driver, Used

IN, OUT, FLUSH = 0, 1, 4
CONTENT = os.urandom(1 << 20)
pytestmark = pytest.mark.anyio


class Guest:
    """The driver, a shell and what they work on."""

    def __init__(self, shell: BlkShell) -> None:
        self.shell = shell
        self.driver = Driver(shell.device, memory_size=4 << 20, event_idx=True)
        self.came: list[Used] = []

    def send(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> int:
        readable = [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]
        return self.driver.send(0, readable, [*([room] if room else []), 1])

    async def wait(self, count: int) -> list[Used]:
        self.driver.kick(0)
        with anyio.fail_after(20):
            while len(self.came) < count:
                self.came += self.driver.used(0)
                await anyio.sleep(0.001)
        came, self.came = self.came, []
        return came


@pytest.fixture(params=["writeback", "none", "unsafe", "overlay"])
async def guest(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Guest]:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    overlay = make_overlay(path, None, directory=tmp_path) if request.param == "overlay" else None
    cache: CacheMode = request.param if overlay is None else "writeback"
    disk = await open_disk(DriveConfig(path=path, cache=cache), overlay)
    shell = BlkShell(VirtioBlk(disk.size, BlockMetrics()), disk, asyncio.get_running_loop())
    guest = Guest(shell)
    yield guest
    assert await shell.aclose()
    if overlay is not None:
        assert path.read_bytes() == CONTENT


async def test_a_guest_reads_what_it_wrote(guest: Guest) -> None:
    for number in range(16):
        guest.send(OUT, number * 8, bytes([number]) * 4096)
    guest.send(FLUSH)
    assert [used.data for used in await guest.wait(17)] == [b"\0"] * 17
    for number in range(16):
        guest.send(IN, number * 8, room=4096)
    heads = await guest.wait(16)
    assert sorted(used.data for used in heads) == sorted(bytes([number]) * 4096 + b"\0" for number in range(16))
    assert guest.driver.interrupts > 0
    assert guest.shell.device.metrics.write_bytes == 16 * 4096


async def test_a_reset_with_requests_under_way_is_forgotten_by_the_next_driver(guest: Guest) -> None:
    for number in range(8):
        guest.send(OUT, number, b"o" * 512)
    guest.driver.kick(0)
    guest.driver.reset()
    guest.driver.start()
    guest.send(IN, 1024, room=512)
    (used,) = await guest.wait(1)
    assert used.data == CONTENT[1024 * 512 : 1025 * 512] + b"\0"
    with anyio.fail_after(20):
        await guest.shell.drained()
    assert guest.driver.used(0) == []


async def test_drained_waits_for_what_is_under_way(guest: Guest) -> None:
    for number in range(12):
        guest.send(OUT, number * 8, b"d" * 4096)
    guest.driver.kick(0)
    with anyio.fail_after(20):
        await guest.shell.drained()
    assert guest.shell.device.drain()
    assert len(guest.driver.used(0)) == 12


async def test_closing_answers_nobody_any_more(guest: Guest) -> None:
    guest.shell.close()
    guest.send(IN, 0, room=512)
    (used,) = await guest.wait(1)
    assert used.data[-1:] == b"\1"


async def test_resets_on_another_thread_at_any_moment_do_no_harm(guest: Guest) -> None:
    loop, driver, device = asyncio.get_running_loop(), guest.driver, guest.shell.device

    def kick() -> None:
        if driver.transport.kick(0):
            loop.call_soon(kick)

    def vcpu() -> None:
        for turn in range(150):
            for number in range(turn % 12):
                guest.send((IN, OUT)[number & 1], number, b"v" * 512 * (number & 1), 512 * (~number & 1))
            loop.call_soon_threadsafe(kick)
            if turn % 3:
                os.sched_yield()
            with device.session():  # the device's lock, which a register access has as well
                driver.reset()
                driver.start()

    await anyio.to_thread.run_sync(vcpu)
    with anyio.fail_after(20):
        await guest.shell.drained()
    assert not driver.needs_reset
    guest.send(IN, 1024, room=512)
    (used,) = await guest.wait(1)
    assert used.data == CONTENT[1024 * 512 : 1025 * 512] + b"\0"
