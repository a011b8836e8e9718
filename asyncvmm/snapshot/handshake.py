"""The handshake with PID 1 behind a snapshot: fresh entropy and the right time, before the workload goes on.

Lines on the control line (design: guest contract): ``tsc <value> <khz>``, where the machine can tell what the guest's
counter was when the time was read, so that it does not matter when PID 1 gets to read it; then ``go <seed-hex>
<realtime_ns>``, which also opens the pre-exec window. PID 1 answers ``go-done``. One that lives and does not, or that
is none of ours, is not waited for long, and once for all VMs of a snapshot.
"""

from __future__ import annotations

import logging
import os
import time

import anyio

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, GuestGoDone, GuestHeartbeat, VmState
from asyncvmm.machine.base import Machine

SEED_BYTES = 32
ANSWER_S = 20.0
"""Seconds that a PID 1 which is known to answer has for it."""
UNSURE_S = 2.0
"""Seconds for one of which that is not known: it may be somebody else's, and never answer."""
HEARTBEATS = 3
"""A PID 1 that says so many has read the control line meanwhile: it will not answer."""

_log = logging.getLogger("asyncvmm.snapshot")


def go_lines(machine: Machine) -> bytes:
    """The lines, with a seed that nobody else has and the time as it is now."""
    now = machine.guest_time()
    seed = os.urandom(SEED_BYTES).hex()
    if now is None:
        return f"go {seed} {time.time_ns()}\n".encode()
    return f"tsc {now.tsc} {now.khz}\ngo {seed} {now.realtime_ns}\n".encode()


class Answer:
    """PID 1's answer, listened for from when this is made on. ``close`` when nobody waits any more.

    ``expected``: it is known to answer. ``refused``: that it has not answered is its way, and no other VM of the same
    snapshot need be waited for; False as well of one that is expected to and stands still.
    """

    def __init__(self, events: EventHub, *, expected: bool) -> None:
        self._come = anyio.Event()
        self._patience_s = ANSWER_S if expected else UNSURE_S
        self._expected = expected
        self._answered = self._ended = False
        self._heartbeats = 0
        self.refused = False
        self.close = events.attach(self._take)

    def _take(self, event: Event) -> None:
        self._answered |= isinstance(event, GuestGoDone)
        self._ended |= isinstance(event, VmState) and event.state in ("stopped", "failed")
        self._heartbeats += isinstance(event, GuestHeartbeat)
        if self._answered or self._ended or self._heartbeats >= HEARTBEATS:
            self._come.set()

    async def wait(self) -> bool:
        """Until it has come, now that all was said; False if it does not, or the guest has ended instead."""
        if not (self._answered or self._ended):
            self._come, self._heartbeats = anyio.Event(), 0
        with anyio.move_on_after(self._patience_s):
            await self._come.wait()
        if self._answered or self._ended:
            return self._answered and not self._ended
        self.refused = not self._expected or self._come.is_set()
        _log.warning("PID 1 does not say that entropy and clock took effect: is it an old one, or not ours?")
        return False
