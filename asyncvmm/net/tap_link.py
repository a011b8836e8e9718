"""A link over a TAP interface: one frame a read and a write, its virtio header before it, offloads left to the host."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from asyncvmm.errors import TapError
from asyncvmm.net.framing import MAX_FRAME
from asyncvmm.net.link import Link
from asyncvmm.net.tap import VNET_HEADER_SIZE, set_offloads

if TYPE_CHECKING:
    from asyncvmm.devices.virtio.net import GuestOffloads

FRAMES_A_TURN: Final = 64

_REFUSED: Final = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.EFAULT})
"""A frame the interface does not take: its header makes no sense, or it is down. The next one may fare better."""


class TapLink(Link):
    """See Link. ``fd`` is one of ``open_tap``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        *,
        on_down: Callable[[Exception], None] = lambda _: None,
        fail: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(loop, fd, on_down=on_down, fail=fail)
        self._packet = memoryview(bytearray(VNET_HEADER_SIZE + MAX_FRAME))
        self._held = 0

    def start(self, offloads: GuestOffloads) -> None:
        """See NetBackend."""
        try:
            set_offloads(self._fd, csum=offloads.csum, tso4=offloads.tso4, tso6=offloads.tso6, ecn=offloads.ecn)
        except TapError as error:
            self._lose(error)

    def _deliver_pending(self) -> bool:
        if self._held:
            if not self.device.deliver(self._packet[VNET_HEADER_SIZE : self._held], self._packet[:VNET_HEADER_SIZE]):
                return False
            self._held = 0
        return True

    def _read(self) -> bool:
        for _ in range(FRAMES_A_TURN):
            if not self._may_go_on():
                return False
            try:
                self._held = os.readv(self._fd, [self._packet])
            except BlockingIOError:
                return True
            except OSError as error:
                self.device.metrics.tap_read_fails += 1
                self._lose(error)
                return False
            if not self._deliver_pending():
                return False
        return True

    def _enqueue(self, packet: bytes) -> None:
        self._wait(memoryview(packet))

    def _write_some(self) -> None:
        for _ in range(min(FRAMES_A_TURN, len(self._backlog))):
            packet = self._backlog[0]
            try:
                os.write(self._fd, packet)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.device.metrics.tap_write_fails += 1
            self._backlog.popleft()
            self._waiting -= len(packet)
