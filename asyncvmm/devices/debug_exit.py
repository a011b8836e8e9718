"""The debug-exit port: a guest ends itself by writing its exit value. The idea is that of QEMU's isa-debug-exit."""

from __future__ import annotations

from collections.abc import Callable

import attrs


@attrs.frozen
class DebugExitState:
    """A debug-exit port remembers nothing."""


class DebugExit:
    """One write-only port. ``exit`` is told each byte written; reads give 0xff."""

    __slots__ = ("_exit",)

    def __init__(self, exit: Callable[[int], None]) -> None:
        self._exit = exit

    @classmethod
    def from_state(cls, state: DebugExitState, exit: Callable[[int], None]) -> DebugExit:
        """The port that ``state()`` described."""
        return cls(exit)

    def state(self) -> DebugExitState:
        """All that this port remembers."""
        return DebugExitState()

    def read(self, offset: int) -> int:
        """Nothing to read."""
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        """The guest is through, with ``value``."""
        self._exit(value)
