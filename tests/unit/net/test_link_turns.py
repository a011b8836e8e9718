"""A guest whose receive buffers are made of a thousand parts each does not keep the loop to itself."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.devices.virtio.net import RX, VirtioNet
from asyncvmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESCRIPTORS_A_TURN,
    MOST_DESCRIPTORS,
)
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.net.framing import prefix
from asyncvmm.net.stream import StreamLink
from asyncvmm.testing import Driver

MAC = bytes.fromhex("020000000001")
RAM = 1 << 20
FRAMES = 40

pytestmark = pytest.mark.anyio


def offer_long_buffers(driver: Driver) -> None:
    queue = driver.queue(RX)
    table = RAM - 16 * MOST_DESCRIPTORS
    for place in range(MOST_DESCRIPTORS):
        flags = DESC_F_WRITE | DESC_F_NEXT * (place < MOST_DESCRIPTORS - 1)
        struct.pack_into("<QIHH", driver.memory, table + 16 * place, table - 64, 1, flags, place + 1)
    queue.set_descriptor(0, table, 16 * MOST_DESCRIPTORS, DESC_F_INDIRECT, 0)
    for _ in range(queue.size):
        queue.put_available(0)


async def test_frames_for_buffers_of_many_parts_come_over_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, peer = socket.socketpair()
    link = StreamLink(asyncio.get_running_loop(), ours.fileno())
    device = VirtioNet(MAC, link, NetMetrics())
    link.attach(device)
    driver = Driver(device, memory_size=RAM, indirect=True)
    longest = 0
    readable = link._readable

    def measured() -> None:
        nonlocal longest
        before = device.receive_walked
        readable()
        longest = max(longest, device.receive_walked - before)

    monkeypatch.setattr(link, "_readable", measured)
    with ours, peer:
        offer_long_buffers(driver)
        os.write(peer.fileno(), (prefix(64) + bytes(64)) * FRAMES)
        driver.kick(RX)
        with anyio.fail_after(20):
            while driver.queue(RX).used_index < FRAMES:
                await checkpoint()
        assert 0 < longest <= DESCRIPTORS_A_TURN + MOST_DESCRIPTORS
        assert not driver.needs_reset
        link.close()
