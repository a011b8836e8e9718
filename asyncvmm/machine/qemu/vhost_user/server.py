"""The I/O of a vhost-user back end on the event loop: the socket, the descriptors beside its messages, the mappings.

Guest memory has to come as memfds that cannot shrink: a page that goes away under a mapping kills the process that
touches it. QEMU's memory-backend-memfd seals its files so.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.machine.qemu.vhost_user.backend import Backend
from asyncvmm.machine.qemu.vhost_user.message import MAX_REGIONS, Decoder, Message, Region, VhostUserError

TURN: Final = 32
"""Messages that one turn of the loop takes at the most."""

_F_GET_SEALS: Final = 1034
_F_SEAL_SHRINK: Final = 0x0002
_ANCILLARY: Final = socket.CMSG_SPACE(4 * (MAX_REGIONS + 1))
_ONE: Final = struct.pack("=Q", 1)


def _say_nothing(_: object) -> None:
    pass


class VhostUserServer:
    """Serves ``device`` to the front end at the other end of ``connection``, which belongs to the server from now on.

    Made on the loop; ``close`` ends it. rings: how many queues are ours (QEMU keeps the socket device's event queue to
    itself). on_end: told once, on the loop, why the front end's connection has ended, in one line; not after
    ``close``. gave_up: the driver asked for something impossible, in words; once until it starts anew. fail: hears of
    an error of ours, which is none of the guest's; the server has closed by then. ``backend`` is the device's
    transport.
    """

    def __init__(
        self,
        device: VirtioDevice,
        connection: socket.socket,
        *,
        rings: int = 2,
        on_end: Callable[[str], None] = _say_nothing,
        gave_up: Callable[[str], None] = _say_nothing,
        fail: Callable[[Exception], None] = _say_nothing,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._on_end, self._gave_up, self._fail = on_end, gave_up, fail
        self._decoder = Decoder()
        self._kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._due: set[int] = set()
        self._fence = threading.Lock()
        self._closed = False
        self.backend = Backend(device, self, rings)
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def close(self) -> None:
        """Free everything; the device's driver has gone. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._connection)
        self.backend.close()
        self._connection.close()
        _close_all(self._decoder.take_descriptors())
        while self._calls:
            os.close(self._calls.popitem()[1])

    # -- messages ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for _ in range(TURN):
                if not self._read_some():
                    break
        except (VhostUserError, OSError) as error:
            self._end(str(error))
        except Exception as error:  # a device of ours that is wrong must not fail in silence
            self._break(error)

    def _break(self, error: Exception) -> None:
        if self._closed:
            return
        try:
            self.close()
        finally:
            self._fail(error)

    def _end(self, why: str) -> None:
        if not self._closed:
            self.close()
            self._on_end(why)

    def _read_some(self) -> bool:
        """Read, and follow a message that is whole by now; False if there was nothing."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, ancillary, truncated, _ = self._connection.recvmsg(self._decoder.wanted, _ANCILLARY, flags)
        except (BlockingIOError, InterruptedError):
            return False
        descriptors = _descriptors_of(ancillary)
        try:
            message = self._decoder.feed(data, descriptors)
        except VhostUserError:
            _close_all(self._decoder.take_descriptors())
            raise
        if not data:
            raise VhostUserError("the front end has gone")
        if truncated & socket.MSG_CTRUNC:
            raise VhostUserError("more descriptors than a message may have")
        if message is not None:
            self._follow(message)
        return True

    def _follow(self, message: Message) -> None:
        """Whoever keeps a descriptor of the message has its own copy of it."""
        try:
            answer = self.backend.handle(message)
        finally:
            _close_all(message.descriptors)
        if answer is not None and self._connection.send(answer) != len(answer):
            raise VhostUserError("the front end does not read its answers")

    # -- what the state machine asks for -------------------------------------------------------------------------------

    def map(self, regions: Sequence[Region], descriptors: Sequence[int]) -> GuestView:
        """See Shell."""
        mapped = [(r.guest_address, _map(r, fd)) for r, fd in zip(regions, descriptors, strict=True)]
        return GuestView(mapped, fence=self._take_lock)

    def _take_lock(self) -> None:
        with self._fence:
            pass

    def watch_kick(self, index: int, descriptor: int | None) -> None:
        """See Shell."""
        if (former := self._kicks.pop(index, None)) is not None:
            self._loop.remove_reader(former)
            os.close(former)
        if descriptor is not None:
            self._kicks[index] = _own_eventfd(descriptor)
            self._loop.add_reader(self._kicks[index], self._kicked, index)

    def set_call(self, index: int, descriptor: int | None) -> None:
        """See Shell."""
        if (former := self._calls.pop(index, None)) is not None:
            os.close(former)
        if descriptor is not None:
            self._calls[index] = _own_eventfd(descriptor)

    def call(self, index: int) -> None:
        """See Shell."""
        if index in self._calls:
            with suppress(BlockingIOError):  # the counter is full: the guest has been told often enough
                os.write(self._calls[index], _ONE)

    def work(self, index: int) -> None:
        """See Shell."""
        if index not in self._due:
            self._due.add(index)
            self._loop.call_soon(self._work, index)

    def gave_up(self, fault: str) -> None:
        """See Shell."""
        self._gave_up(fault)

    def _kicked(self, index: int) -> None:
        with suppress(BlockingIOError):
            os.read(self._kicks[index], 8)
        if index not in self._due:  # else its turn comes anyway, and two would go on for ever
            self._work(index)

    def _work(self, index: int) -> None:
        self._due.discard(index)
        try:
            if not self._closed and self.backend.kick(index):
                self.work(index)
        except Exception as error:  # as in _read
            self._break(error)


def _map(region: Region, descriptor: int) -> memoryview:
    """Raises VhostUserError."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
        if not seals & _F_SEAL_SHRINK:
            raise VhostUserError("guest memory that may shrink")
        mapping = mmap.mmap(descriptor, region.offset + region.size, mmap.MAP_SHARED)
        mapping.madvise(mmap.MADV_DONTFORK)
    except (OSError, ValueError, OverflowError) as error:
        raise VhostUserError(f"a memory region that cannot be mapped: {error}") from None
    return memoryview(mapping)[region.offset :]


def _own_eventfd(descriptor: int) -> int:
    """A copy of an eventfd that does not block. Raises VhostUserError for any other descriptor."""
    kind = os.readlink(f"/proc/self/fd/{descriptor}")
    if kind != "anon_inode:[eventfd]":
        raise VhostUserError(f"a {kind} instead of an eventfd")
    own = os.dup(descriptor)
    os.set_blocking(own, False)
    return own


def _descriptors_of(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[int, ...]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4])
    return tuple(found)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
