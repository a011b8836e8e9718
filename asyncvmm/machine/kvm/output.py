"""The loop's side of a KVM guest's serial output: both ports' in the order in which the guest wrote it, turn by turn.

Output without a newline may wait ``PARTIAL_LINE_S`` for one, so that a guest that prints byte by byte does not wake the
loop's consumers for each. What the vCPU threads say of it comes to ``ready``; what the native run loop says, by an
eventfd.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from asyncvmm.effects import Effect
from asyncvmm.errors import HostError
from asyncvmm.machine.base import EffectSink
from asyncvmm.machine.kvm.fastpath.binding import Fastpath
from asyncvmm.machine.kvm.interleave import Taken, interleave
from asyncvmm.machine.kvm.platform import Board
from asyncvmm.machine.pacing import Pacer

PARTIAL_LINE_S = 0.002
"""Seconds that output without a newline may wait for one."""


class Output:
    """Output of one guest, on its way to ``on_effects``. ``posted_fd`` is the native run loop's eventfd, -1 if closed.

    All but ``connect`` is for the loop.
    """

    def __init__(self, on_effects: EffectSink) -> None:
        self.posted_fd = -1
        self._pacer = Pacer(on_effects, self._take_waiting)
        self._waits = False
        self._partial: asyncio.TimerHandle | None = None
        self._board: Board | None = None
        self._fastpath: Fastpath | None = None

    def open(self) -> None:
        """Listen to the native run loop, if there will be one. Raises HostError where no descriptor is to be had."""
        try:
            self.posted_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            asyncio.get_running_loop().add_reader(self.posted_fd, self._on_posted)
        except OSError as error:
            raise HostError("serial output", expected="an eventfd to watch", found=error.strerror) from error

    def connect(self, board: Board, fastpath: Fastpath | None) -> None:
        """These are its ports. Called on any thread, before the guest runs."""
        self._board, self._fastpath = board, fastpath

    def close(self) -> None:
        """Listen no more; nothing that could ring may run. May be called again."""
        if self.posted_fd >= 0:
            asyncio.get_running_loop().remove_reader(self.posted_fd)
            os.close(self.posted_fd)
            self.posted_fd = -1

    def ready(self) -> None:
        """A port has output: hand it out now, when a newline comes, or when what was taken before is out."""
        if self._pacer.busy:
            self._waits = True
        elif self._is_urgent():
            self.put(self.take())
        elif self._partial is None:
            self._partial = asyncio.get_running_loop().call_later(PARTIAL_LINE_S, self._flush_partial)

    def take(self) -> Sequence[Effect]:
        """Take both ports' output. Control first: its marks then never point beyond the console's bytes."""
        board = self._board
        if board is None:
            return ()
        with board.control.lock:
            control = Taken(*board.control.device.take_output())
            marks, board.control_marks = board.control_marks, []
        console = board.console.take()
        return interleave(console, control, marks)

    def put(self, effects: Sequence[Effect]) -> None:
        """Hand out effects, behind those that wait for their turn."""
        self._pacer.put(effects)

    async def told(self) -> None:
        """Hand out all that there is, turn by turn; no vCPU may run."""
        self.put(self.take())
        await self._pacer.drain()

    async def finish(self) -> None:
        """Hand out what is left, a bounded part of it."""
        self.put(self.take())
        await self._pacer.finish()
        if self._partial is not None:
            self._partial.cancel()

    def _on_posted(self) -> None:
        """The native run loop has output: it rings once for the first byte and once when it has become urgent."""
        os.eventfd_read(self.posted_fd)
        self.ready()

    def _take_waiting(self) -> None:
        if self._waits:
            self._waits = False
            self.ready()

    def _is_urgent(self) -> bool:
        assert self._board is not None
        posted = self._fastpath is not None and self._fastpath.data.urgent
        return bool(posted) or self._board.console.device.urgent or self._board.control.device.urgent

    def _flush_partial(self) -> None:
        self._partial = None
        if self._pacer.busy:
            self._waits = True
        else:
            self.put(self.take())
