"""JsonLines: a VM's events as JSON lines, one write per loop turn, never in the guest's way.

A reader that is slow fills a bounded buffer; after that lines are dropped whole, counted, and ``log.lost`` says how
many as soon as there is room. A reader that is dead (a closed pipe, a full disk) costs one warning.
"""

from __future__ import annotations

import asyncio
import logging

import anyio

from asyncvmm.events.encoding import to_line
from asyncvmm.events.outputs import SharedFile, Target, WriteWatch, name_of, open_output, reason_of
from asyncvmm.events.types import Event, LogLost

LIMIT = 1 << 20
"""Bytes that wait for a slow reader."""

_RETRY_S = 0.05

_log = logging.getLogger("asyncvmm.events")


class JsonLines:
    """Writes events to ``target`` (see outputs.Target). Attach ``publish`` to an EventHub.

    ``vm_id`` and ``epoch_ns`` (wall clock at the VM's start, ns) go into each line. ``lost`` counts the lines that
    did not get there. Opens the target at once and without waiting: raises ConfigError if that cannot be.
    """

    def __init__(self, target: Target, vm_id: str, epoch_ns: int, *, limit: int = LIMIT) -> None:
        self.vm_id = vm_id
        self.epoch_ns = epoch_ns
        self.limit = limit
        self.lost = 0
        self._target = target
        self._unsaid = 0
        self._lost_t_ns = 0
        self._buffer = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None
        self._watch: WriteWatch | None = None
        self._drained: anyio.Event | None = None
        self._dead = False
        self._output = open_output(target)

    def publish(self, event: Event) -> None:
        """Queue the event's line. On the loop only; never raises, never waits."""
        if self._dead:
            self.lost += 1
            return
        if self._unsaid:
            self._say_lost()
        line = to_line(event, self.vm_id, self.epoch_ns)
        if self._unsaid or len(self._buffer) + len(line) > self.limit:
            self._drop(event)
        else:
            self._buffer += line
        if self._timer is None and self._watch is None:
            self._schedule()

    async def aclose(self, timeout_s: float = 1.0) -> None:
        """Write what is left, ``timeout_s`` seconds at the most even if cancelled by a scope, and close."""
        try:
            with anyio.move_on_after(timeout_s, shield=True):
                await self._drain()
        finally:
            self.close()

    def close(self) -> None:
        """Write what the target takes at once, and close. What is left counts as lost. May be called again."""
        if not self._dead:
            self._flush()
            self._give_up()

    async def _drain(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._flush()
        while self._buffer:
            self._drained = anyio.Event()
            await self._drained.wait()

    def _schedule(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # no loop yet: the first event published on one takes these lines with it
        self._timer = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Write until all is written or the target takes no more; then wait for it."""
        self._stop_waiting()
        if self._dead:
            return
        try:
            self._write_all()
        except OSError as error:
            self._say_gone(error)
            self._give_up()
            return
        if self._buffer:
            self._wait()
        elif self._drained is not None:
            self._drained.set()

    def _say_gone(self, error: OSError) -> None:
        if isinstance(self._target, SharedFile):
            if self._target.is_gone:
                return
            self._target.is_gone = True
        _log.warning("%s is gone, its lines are dropped: %s", name_of(self._target), reason_of(error))

    def _write_all(self) -> None:
        while True:
            while self._buffer:
                count = self._output.write(self._buffer)
                if not count:
                    return
                del self._buffer[:count]
            if not self._unsaid:
                return
            self._say_lost()

    def _wait(self) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._watch = WriteWatch(self._output.fd)
            self._loop.add_reader(self._watch.fd, self._flush)
        except (OSError, ValueError):  # what epoll does not take
            self._timer = self._loop.call_later(_RETRY_S, self._flush)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._watch.fd)
            self._watch.close()
            self._watch = None

    def _drop(self, event: Event) -> None:
        self.lost += 1
        self._unsaid += 1
        self._lost_t_ns = event.t_ns

    def _say_lost(self) -> None:
        line = to_line(LogLost(self._lost_t_ns, self._unsaid), self.vm_id, self.epoch_ns)
        if len(self._buffer) + len(line) <= self.limit or not self._buffer:
            self._buffer += line
            self._unsaid = 0

    def _give_up(self) -> None:
        self._stop_waiting()
        self._dead = True
        self.lost += self._buffer.count(b"\n")
        self._buffer.clear()
        self._output.close()
        if self._drained is not None:
            self._drained.set()
