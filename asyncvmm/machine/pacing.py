"""Handing effects to the VM in turns: a guest that floods gets a share of the loop, never the whole of it.

What a machine has is cut into turns of at most ``TURN_BYTES``; between two turns the loop serves everybody else.
While turns are left the machine takes no more from its guest's ports (``busy``), whose buffers are bounded and count
what they drop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from asyncvmm.effects import Effect, SerialOutput
from asyncvmm.machine.base import EffectSink

TURN_BYTES = 4096
"""Bytes of one turn. A line can be a single byte, and costs microseconds."""

FINAL_BYTES = 1 << 18
"""Bytes still handed out after the machine was stopped; the rest is counted as lost."""


class Pacer:
    """``put`` effects in order; ``sink`` gets them in turns; ``idle`` is called when all are out and more may come."""

    def __init__(self, sink: EffectSink, idle: Callable[[], None]) -> None:
        self._sink = sink
        self._idle = idle
        self._waiting: deque[Effect] = deque()
        self._scheduled: asyncio.Handle | None = None

    @property
    def busy(self) -> bool:
        """Whether effects are waiting for their turn."""
        return bool(self._waiting)

    def put(self, effects: Sequence[Effect]) -> None:
        """Take effects; the first turn is now, unless others are waiting already."""
        was_busy = self.busy
        for effect in effects:
            self._waiting.extend(_pieces(effect))
        if self._waiting and not was_busy:
            self._turn()

    async def drain(self) -> None:
        """Hand out all that waits, turn by turn."""
        while self._waiting:
            self._hand_out()
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """Hand out what is left, a bounded part of it, turn by turn; the rest is counted as lost."""
        if self._scheduled is not None:
            self._scheduled.cancel()
        left = FINAL_BYTES
        while self._waiting and left > 0:
            left -= self._hand_out()
            await asyncio.sleep(0)
        self._sink(list(_as_lost(self._waiting)))
        self._waiting.clear()

    def _turn(self) -> None:
        self._scheduled = None
        self._hand_out()
        if self._waiting:
            self._scheduled = asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._idle()

    def _hand_out(self) -> int:
        turn: list[Effect] = []
        size = 0
        while self._waiting and size < TURN_BYTES:
            effect = self._waiting.popleft()
            size += len(effect.data) if isinstance(effect, SerialOutput) else 1
            turn.append(effect)
        if turn:
            self._sink(turn)
        return size


def _pieces(effect: Effect) -> Iterator[Effect]:
    """An effect cut into pieces of a turn at the most; what was lost came after the last."""
    if not isinstance(effect, SerialOutput) or len(effect.data) <= TURN_BYTES:
        yield effect
        return
    times = 0
    for start in range(0, len(effect.data), TURN_BYTES):
        data = effect.data[start : start + TURN_BYTES]
        newlines = effect.newlines[times : times + data.count(b"\n")]
        times += len(newlines)
        last = start + TURN_BYTES >= len(effect.data)
        yield SerialOutput(effect.port, data, newlines, effect.lost if last else 0)


def _as_lost(effects: Sequence[Effect] | deque[Effect]) -> Iterator[Effect]:
    for effect in effects:
        if isinstance(effect, SerialOutput):
            yield attrs.evolve(effect, data=b"", newlines=(), lost=effect.lost + len(effect.data))
        else:
            yield effect
