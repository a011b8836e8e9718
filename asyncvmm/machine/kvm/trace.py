"""ExitTrace: every exit of a KVM machine as an async iterator, bounded, for debugging."""

from __future__ import annotations

from collections import deque

import anyio

from asyncvmm.errors import ConfigError
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.tracing import TracedExit


class ExitTrace:
    """Iterates over exits until the machine ends or ``aclose``. What a slow reader cannot hold is counted in ``lost``.

    One trace at a time: a new one takes over from an older one, which then ends.
    """

    def __init__(self, machine: KvmMachine, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError("capacity of an exit trace", expected="at least 1", found=capacity)
        self._overflowed = 0
        self._machine = machine
        self._dropped_before = machine.dropped_notices
        self._capacity = capacity
        self._held: deque[TracedExit] = deque()
        self._ended = False
        self._awake: anyio.Event | None = None
        machine.trace(self)

    @property
    def lost(self) -> int:
        """Exits that are missing: for want of room here, or on the way from the vCPU threads."""
        return self._overflowed + self._machine.dropped_notices - self._dropped_before

    def __aiter__(self) -> ExitTrace:
        return self

    async def __anext__(self) -> TracedExit:
        while not self._held:
            if self._ended:
                raise StopAsyncIteration
            self._awake = self._awake or anyio.Event()
            await self._awake.wait()
        return self._held.popleft()

    async def aclose(self) -> None:
        """Stop tracing."""
        self._machine.untrace(self)
        self.end()

    def put(self, traced: TracedExit) -> None:
        """An exit has come. For the machine."""
        if len(self._held) >= self._capacity:
            self._overflowed += 1
            return
        self._held.append(traced)
        self._wake()

    def end(self) -> None:
        """No more exits will come. For the machine."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._awake is not None:
            self._awake.set()
            self._awake = None
