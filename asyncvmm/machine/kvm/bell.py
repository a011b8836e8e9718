"""Bell: how a thread outside of Python tells a loop that something is done, now or a little later: by a timer.

It is rung with timerfd_settime(2), see fastpath/runner.c; a loop that is not on a processor then is woken by it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from asyncvmm.machine.kvm.fastpath.binding import Library


class Bell:
    """For one loop, the running one. ``fd`` is the timer's descriptor, open until it was heard or is closed."""

    def __init__(self, library: Library, heard: Callable[[], None]) -> None:
        """``heard`` is called on the loop, once. Raises OSError if there is none to be had."""
        self.loop = asyncio.get_running_loop()
        self.fd = library.bell()
        if self.fd < 0:
            raise OSError(-self.fd, os.strerror(-self.fd))
        self._heard = heard
        try:
            self.loop.add_reader(self.fd, self._hear)
        except BaseException:
            os.close(self.fd)
            raise

    def _hear(self) -> None:
        self.close()
        self._heard()

    def close(self) -> None:
        """Nothing is heard any more. On the loop, and when nobody rings it any more. May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.loop.remove_reader(fd)
            os.close(fd)

    def drop(self) -> None:
        """As ``close``, on any thread, and after the loop's end: soon."""
        if _running() is self.loop:
            self.close()
            return
        try:
            self.loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop has closed, and listens to nothing
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
