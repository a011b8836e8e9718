"""A link over a stream socket, each frame behind its length: what a user-mode network's helper speaks.

One read of up to 256 KiB and one write of up to 256 pieces a turn. Frames for the guest go from the read buffer
straight into its memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from itertools import islice
from typing import Final

from asyncvmm.net.framing import FrameBuffer, FramingError, prefix
from asyncvmm.net.link import Link

MOST_PIECES: Final = 256
"""Of one write: a length and a frame are two."""

_VIRTIO_HEADER: Final = 12


class StreamLink(Link):
    """See Link. ``fd`` is a connected stream socket, which is made non-blocking."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        *,
        on_down: Callable[[Exception], None] = lambda _: None,
        fail: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(loop, fd, on_down=on_down, fail=fail)
        os.set_blocking(fd, False)
        self._frames = FrameBuffer()

    def _deliver_pending(self) -> bool:
        frames, device = self._frames, self.device
        try:
            while (frame := frames.peek()) is not None:
                if not self._may_go_on() or not device.deliver(frame):
                    return False
                frames.skip()
        except FramingError as error:
            device.metrics.tap_read_fails += 1
            self._lose(error)
            return False
        return True

    def _read(self) -> bool:
        try:
            size = os.readv(self._fd, [self._frames.space()])
        except BlockingIOError:
            return True
        except OSError as error:
            self.device.metrics.tap_read_fails += 1
            self._lose(error)
            return False
        if not size:
            self._lose(ConnectionResetError("the network helper has closed the connection"))
            return False
        self._frames.fed(size)
        return self._deliver_pending()

    def _enqueue(self, packet: bytes) -> None:
        frame = memoryview(packet)[_VIRTIO_HEADER:]
        self._wait(memoryview(prefix(len(frame))))
        self._wait(frame)

    def _write_some(self) -> None:
        backlog = self._backlog
        done = os.writev(self._fd, list(islice(backlog, MOST_PIECES)))
        self._waiting -= done
        while done:
            piece = backlog.popleft()
            if len(piece) > done:
                backlog.appendleft(piece[done:])
                return
            done -= len(piece)
