"""Notices: what a KVM machine's vCPU threads have to say to its loop, through one mailbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

import attrs

from asyncvmm.effects import Port, Stopped
from asyncvmm.machine.kvm.platform import Outlets
from asyncvmm.machine.kvm.port_watches import PortWritten
from asyncvmm.machine.kvm.tracing import TracedExit
from asyncvmm.mailbox import Mailbox


@attrs.frozen
class HasOutput:
    """This port has output to be taken."""

    port: Port


@attrs.frozen
class HasRoom:
    """This port has room for input."""

    port: Port


@attrs.frozen
class FirstExit:
    """Of a restored guest."""


Notice = HasOutput | HasRoom | Stopped | TracedExit | PortWritten | FirstExit


class Notices:
    """``hear`` is called with each, on the loop. All but ``drain`` may be called on any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hear: Callable[[Notice], None]) -> None:
        self._mailbox: Mailbox[Notice] = Mailbox(lambda: loop.call_soon_threadsafe(self.drain))
        self._hear = hear

    def post(self, notice: Notice) -> None:
        """Leave it for the loop. Traced exits are dropped where there are too many."""
        self._mailbox.post(notice, droppable=isinstance(notice, TracedExit))

    @property
    def dropped(self) -> int:
        """Those that found the mailbox full."""
        return self._mailbox.dropped

    def drain(self) -> None:
        """Have what waits heard. On the loop."""
        for notice in self._mailbox.drain():
            self._hear(notice)

    def outlets(self, irq: Callable[[int, bool], None], halt: Callable[[Stopped], None]) -> Outlets:
        """A board's. ``halt``: is told that the guest has asked for its end."""
        return Outlets(
            irq=irq,
            output_pending=lambda port: self.post(HasOutput(port)),
            room=lambda port: self.post(HasRoom(port)),
            shutdown=lambda: halt(_stopped("shutdown")),
            reset=lambda: halt(_stopped("reset")),
            debug_exit=lambda code: halt(attrs.evolve(_stopped("debug-exit"), code=code)),
        )


def _stopped(reason: Literal["shutdown", "reset", "debug-exit"]) -> Stopped:
    return Stopped(reason, detail=f"the guest asked for {reason}", last_exit="IO", t_ns=time.monotonic_ns())
