"""QEMU's half of vhost-user, for the back end's tests: messages, a sealed memfd, rings that a driver works in."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, cast

from asyncvmm.devices.virtio.ids import VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1
from asyncvmm.machine.qemu.vhost_user.message import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    HEADER_SIZE,
    VERSION,
    Request,
)
from asyncvmm.testing.rings import DriverQueue

USER_ADDRESS = 0x7F00_0000_0000
GUEST_ADDRESS = 0x10_0000
MEMORY = 1 << 20
SHARE = MEMORY // 2
RINGS = 2
SIZE = 64
_ADD_SEALS, _SEAL_SHRINK = 1033, 2


class FrontEnd:
    """Speaks to a server at the other end of ``connection``. ``memory`` is the guest's RAM."""

    def __init__(self, connection: socket.socket, *, sealed: bool = True) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(self.memfd, MEMORY)
        if sealed:
            fcntl.fcntl(self.memfd, _ADD_SEALS, _SEAL_SHRINK)
        self.memory = mmap.mmap(self.memfd, MEMORY)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(RINGS)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(RINGS)]
        self.queues: list[DriverQueue] = []
        self.event_idx = False

    def close(self) -> None:
        self.connection.close()
        self.memory.close()
        for descriptor in (self.memfd, *self.kicks, *self.calls):
            os.close(descriptor)

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        data = struct.pack("<III", request, VERSION | flags, len(payload)) + payload
        socket.send_fds(self.connection, [data], list(fds))

    async def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> bytes:
        """Send, and give the reply's payload; ConnectionError if the back end hangs up."""
        self.send(request, payload, fds, flags)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            data = await loop.sock_recv(self.connection, 4096)
        if not data:
            raise ConnectionError
        assert struct.unpack_from("<II", data) == (request, VERSION | 4)
        return data[HEADER_SIZE:]

    async def acknowledged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert await self.ask(request, payload, fds, FLAG_NEED_REPLY) == bytes(8)

    def u64(self, request: int, value: int, fds: Sequence[int] = ()) -> None:
        self.send(request, struct.pack("<Q", value), fds)

    def state(self, request: int, index: int, value: int) -> None:
        self.send(request, struct.pack("<II", index, value))

    # -- from nothing to a running driver --------------------------------------------------------------------------

    async def start(self) -> None:
        await self.negotiate()
        await self.give_memory()
        self.lay_out()
        for index in range(RINGS):
            self.u64(Request.SET_VRING_CALL, index, [self.calls[index]])
            self.start_ring(index, 0)
        await self.in_step()

    async def negotiate(self) -> None:
        self.u64(Request.SET_PROTOCOL_FEATURES, 1 << 0 | 1 << 3 | 1 << 9)
        features = 1 << VIRTIO_F_VERSION_1 | 1 << F_PROTOCOL_FEATURES | self.event_idx << VIRTIO_F_EVENT_IDX
        self.u64(Request.SET_FEATURES, features)

    async def give_memory(self) -> None:
        await self.acknowledged(Request.SET_MEM_TABLE, table(), [self.memfd])

    def lay_out(self) -> None:
        """Rings as a new driver makes them."""
        self.memory[:] = bytes(MEMORY)
        memory = cast(Any, self.memory)
        self.queues = [
            DriverQueue(memory, i * SHARE, (i + 1) * SHARE, SIZE, event_idx=self.event_idx) for i in range(RINGS)
        ]
        for queue in self.queues:
            _lift(queue)

    def start_ring(self, index: int, base: int) -> None:
        queue = self.queues[index]
        self.state(Request.SET_VRING_NUM, index, SIZE)
        self.state(Request.SET_VRING_BASE, index, base)
        self.send(Request.SET_VRING_ADDR, addresses(index, queue))
        self.u64(Request.SET_VRING_KICK, index, [self.kicks[index]])
        self.state(Request.SET_VRING_ENABLE, index, 1)

    async def stop_ring(self, index: int) -> int:
        """GET_VRING_BASE."""
        answer = await self.ask(Request.GET_VRING_BASE, struct.pack("<II", index, 0))
        assert answer[:4] == struct.pack("<I", index)
        return int(struct.unpack("<I", answer[4:])[0])

    async def in_step(self) -> None:
        """Until the back end has followed every message."""
        await self.ask(Request.GET_FEATURES)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def interrupts(self, index: int) -> int:
        try:
            return os.eventfd_read(self.calls[index])
        except BlockingIOError:
            return 0


def _lift(queue: DriverQueue) -> None:
    """Guest RAM does not begin at 0 here: buffers' addresses are not offsets."""
    write = queue.set_descriptor

    def lifted(index: int, address: int, length: int, flags: int, following: int) -> None:
        write(index, address + GUEST_ADDRESS, length, flags, following)

    queue.set_descriptor = lifted  # type: ignore[method-assign]


def table(size: int = MEMORY, offset: int = 0) -> bytes:
    """A memory table of one region."""
    return struct.pack("<IIQQQQ", 1, 0, GUEST_ADDRESS, size, USER_ADDRESS, offset)


def addresses(index: int, queue: DriverQueue, lift: int = USER_ADDRESS) -> bytes:
    """Where the rings of ``queue`` are."""
    places = (queue.descriptors, queue.device_area, queue.driver_area)
    return struct.pack("<IIQQQQ", index, 0, *(place + lift for place in places), 0)
