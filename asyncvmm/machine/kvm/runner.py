"""Runners: threads that wait outside of Python for a restored VM to make, and then run its vCPU; see fastpath/runner.c.

A runner whose VM has ended waits for the next one. Some of them are kept, as are the worker threads of an event loop:
idle ones belong to nobody, have nothing open, and go with the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncvmm.machine.kvm.fastpath.binding import Errand, Library, load
from asyncvmm.machine.kvm.vcpu import KICK_SIGNAL

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.restoring import LaunchChain

IDLE_NAME = "asyncvmm idle runner"
MOST_IDLE = 4
"""Runners that are kept."""

_SENT = 1
_GATE, _BELL = Errand.gate.offset, Errand.bell.offset
_ORDER = struct.Struct("<IQQIIII")
"""Errand from ``gate`` to ``clock``."""

Serve = Callable[[], None]


class Runner:
    """One thread. It becomes idle by itself, when it is ready, and again when what it was sent for has ended."""

    def __init__(self, library: Library) -> None:
        """Start it. Waits until it was begun, some 0.1 ms: not for the loop."""
        self.ident = 0
        self.errand = Errand()
        self._address = ctypes.addressof(self.errand)
        self._library = library
        self._serve: Serve | None = None
        self._lent: tuple[object, ...] = ()
        self.thread = threading.Thread(target=self._main, name=IDLE_NAME, daemon=True)
        self.thread.start()

    def send(self, chain: LaunchChain, slots: array[int], gate: int, serve: Serve) -> None:
        """Have a chain made that was laid out in ``slots``, and its vCPU entered if the gate is open, or once it is
        (``gate`` 0). Then ``serve`` is called there.

        An idle runner that was taken, only; at once, on any thread.
        """
        self._serve, self._lent = serve, (chain, slots)
        address, _ = slots.buffer_info()
        _ORDER.pack_into(
            self.errand, _GATE, gate, chain.address, address, chain.count, chain.first, chain.vcpu, chain.clock
        )
        self._library.decide(self._address, _SENT)

    def ring(self, event_fd: int) -> bool:
        """Have ``event_fd`` rung once, when the chain is made; it must not be closed before. True if that was so
        already: it is not rung then. Once an errand."""
        return self._library.decide(self._address + _BELL, event_fd + 1) != 0

    def decide(self, gate: int) -> None:
        """Open the gate or shut it, see runner.c. The first decision holds."""
        self._library.decide(self._address + _GATE, gate)

    def is_here(self) -> bool:
        """Whether it has begun, on this thread's processor."""
        return bool(self._library.is_here(self._address))

    # -- on its thread -----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        self.errand.mask = sum(1 << (number - 1) for number in blocked - {KICK_SIGNAL})
        self.ident = threading.get_ident()
        while _keep(self):
            self._library.wait(self._address)
            if self._serve is not None:
                self._serve()
            self._forget()

    def _forget(self) -> None:
        """The VM is gone, and with it all that it was sent for; a kick that came too late must not reach the next."""
        errand, mask = self.errand, self.errand.mask
        ctypes.memset(self._address, 0, ctypes.sizeof(Errand))
        errand.mask = mask
        self._serve, self._lent, self.thread.name = None, (), IDLE_NAME
        signal.sigtimedwait([KICK_SIGNAL], 0)


_idle: list[Runner] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child has none of the threads


def take() -> Runner | None:
    """An idle one, the caller's to send; None if there is none."""
    try:
        return _idle.pop()
    except IndexError:
        return None


def give_back(runner: Runner) -> None:
    """One that was taken and not sent."""
    _idle.append(runner)


def make_one() -> None:
    """See to it that there is one soon, where the native library is. Blocks while a thread starts."""
    library = load()
    if library is not None and not _idle:
        Runner(library)


def any_idle() -> bool:
    """Whether there is one to be taken."""
    return bool(_idle)


def _keep(runner: Runner) -> bool:
    """Whether it is to wait for the next."""
    if len(_idle) >= MOST_IDLE:
        return False
    _idle.append(runner)
    return True
