"""The loop's side of a KVM guest's serial input: bytes wait here until the port's backlog has room for them."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from asyncvmm.effects import Port
from asyncvmm.errors import StateError
from asyncvmm.machine.kvm.platform import SerialPort

_FEED_BYTES = 1 << 13
"""Bytes offered to a port at a time: twice what its backlog holds, so that it always says when there is room again."""


class Input:
    """Input of one guest. ``over``: the state in which it reads no more, None while it may."""

    def __init__(self, over: Callable[[], str | None]) -> None:
        self._over = over
        self._room: dict[Port, anyio.Event] = {}
        self._writing: dict[Port, anyio.Lock] = {}

    async def write(self, serial: SerialPort, data: bytes) -> None:
        """Feed the port's receive backlog, waiting for the guest to make room; one writer after the other.

        Raises StateError if the guest ends meanwhile.
        """
        rest = memoryview(data)
        async with self._writing.setdefault(serial.name, anyio.Lock()):
            while rest:
                if (state := self._over()) is not None:
                    raise StateError("serial input", expected="a running guest", state=state)
                room = self._room[serial.name] = anyio.Event()
                rest = rest[serial.feed(bytes(rest[:_FEED_BYTES])) :]
                if rest:
                    await room.wait()

    def wake(self, port: Port) -> None:
        """There is room."""
        if port in self._room:
            self._room[port].set()

    def wake_all(self) -> None:
        """Have every writer look at the state."""
        for event in self._room.values():
            event.set()
