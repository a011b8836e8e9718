"""The handshake with PID 1 behind a snapshot: fresh entropy and the right time, before the workload goes on.

Lines on the control line (design: guest contract): ``tsc <value> <khz>``, where the machine can tell what the guest's
counter was when the time was read, so that it does not matter when PID 1 gets to read it; then ``go <seed-hex>
<realtime_ns>``, which also opens the pre-exec window. PID 1 answers ``go-done``.
"""

from __future__ import annotations

import logging
import os
import time

import anyio

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, GuestGoDone, VmState
from asyncvmm.machine.base import Machine

SEED_BYTES = 32
ANSWER_S = 20.0
"""Seconds that PID 1 has to answer; one of an old image never does."""

_log = logging.getLogger("asyncvmm.snapshot")


def go_lines(machine: Machine) -> bytes:
    """The lines, with a seed that nobody else has and the time as it is now."""
    now = machine.guest_time()
    seed = os.urandom(SEED_BYTES).hex()
    if now is None:
        return f"go {seed} {time.time_ns()}\n".encode()
    return f"tsc {now.tsc} {now.khz}\ngo {seed} {now.realtime_ns}\n".encode()


class Answer:
    """PID 1's answer, waited for from when this is made on. ``close`` when nobody waits any more."""

    def __init__(self, events: EventHub) -> None:
        self._come = anyio.Event()
        self._ended = False
        self.close = events.attach(self._take)

    def _take(self, event: Event) -> None:
        if isinstance(event, VmState):
            self._ended = event.state in ("stopped", "failed")
        if self._ended or isinstance(event, GuestGoDone):
            self._come.set()

    async def wait(self) -> bool:
        """Until it has come; False if it does not, or the guest has ended instead."""
        with anyio.move_on_after(ANSWER_S):
            await self._come.wait()
            return not self._ended
        _log.warning("PID 1 did not say in %g s that entropy and clock took effect: is its image an old one?", ANSWER_S)
        return False
