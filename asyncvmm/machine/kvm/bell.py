"""Bell: how a thread outside of Python tells a loop that something is done: by an eventfd.

It is rung with write(2), see fastpath/runner.c, and may be rung again when it was heard already: its
descriptor is closed when the loop listens no more, and nobody rings it any more. The loop has but a weak reference: one
that was lost, as whoever made it was broken off by a signal, goes as all garbage does.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable

from asyncvmm.home_loop import running_loop
from asyncvmm.machine.kvm.fastpath.binding import Library


class Bell:
    """For one loop, the running one. ``fd`` is the eventfd, -1 when it is closed."""

    def __init__(self, library: Library, heard: Callable[[], None]) -> None:
        """``heard`` is called on the loop, once. Raises OSError if there is no descriptor to be had."""
        self.loop = asyncio.get_running_loop()
        self.fd = library.bell()
        if self.fd < 0:
            raise OSError(-self.fd, os.strerror(-self.fd))
        self._heard = heard
        self._lock = threading.Lock()
        self._is_listened_to = self._may_be_rung = True
        try:
            self.loop.add_reader(self.fd, _hear, weakref.ref(self))
        except BaseException:
            fd, self.fd = self.fd, -1
            os.close(fd)
            raise

    def hear(self) -> None:
        """It was rung. On the loop."""
        self.deafen()
        self._heard()

    def silence(self) -> None:
        """Nobody rings it any more. On any thread, any number of times."""
        with self._lock:
            self._may_be_rung = False
            self._close_if_unused()

    def deafen(self) -> None:
        """The loop listens no more. On the loop, any number of times."""
        with self._lock:
            if self._is_listened_to:
                self._is_listened_to = False
                self.loop.remove_reader(self.fd)
                self._close_if_unused()

    def close(self) -> None:
        """Nobody listens or rings any more. On the loop, any number of times."""
        self.deafen()
        self.silence()

    def drop(self) -> None:
        """As ``close``, on any thread, and after the loop's end: soon."""
        if running_loop() is self.loop:
            self.close()
            return
        try:
            self.loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop has closed, and listens to nothing
            self._is_listened_to = False
            self.silence()

    def _close_if_unused(self) -> None:
        if not self._is_listened_to and not self._may_be_rung and self.fd >= 0:
            fd, self.fd = self.fd, -1  # first, for a signal's handler may raise behind the call
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self._lose()

    def _lose(self) -> None:
        try:
            self.loop.call_soon_threadsafe(_stop_listening, self.loop, self.fd)
        except RuntimeError:  # the loop has closed
            os.close(self.fd)


def _hear(bell: weakref.ref[Bell]) -> None:
    rung = bell()
    if rung is not None:
        rung.hear()


def _stop_listening(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    loop.remove_reader(fd)
    os.close(fd)
