"""Runners: threads that wait outside of Python for a restored VM to make, and then run its vCPU; see fastpath/runner.c.

A runner whose VM has ended waits for the next one. Some of them are kept, as are the worker threads of an event loop:
idle ones belong to nobody, have nothing open, and go with the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

from asyncvmm.machine.kvm.fastpath.binding import Errand, Library, load
from asyncvmm.machine.kvm.vcpu import KICK_SIGNAL
from asyncvmm.machine.threads import start_thread

IDLE_NAME = "asyncvmm idle runner"
MOST_IDLE = 4
"""Runners that are kept."""

_SENT = 1
_GATE = Errand.gate.offset

Serve = Callable[[], None]


class Runner:
    """One thread. It becomes idle by itself, when it is ready, and again when what it was sent for has ended."""

    def __init__(self, library: Library) -> None:
        """Start it. Waits until it was begun, some 0.1 ms: not for the loop. Raises HostError if none is to be had."""
        self.ident = 0
        self.errand = Errand()
        self._address = ctypes.addressof(self.errand)
        self._library = library
        self._serve: Serve | None = None
        self.thread = threading.Thread(target=self._main, name=IDLE_NAME, daemon=True)
        start_thread(self.thread)

    def send(self, order: int, gate: int, serve: Serve) -> None:
        """Have a chain made, and its vCPU entered if the gate is open, or once it is (``gate`` 0). Then ``serve`` is
        called there. ``order``: the address of an Order; what it names must last until then. Its bell, see bell.py, is
        rung when the chain is made or, if the gate was open by then, when the guest has come out, in no case later than
        ``serve``.

        An idle runner that was taken, only; at once, on any thread.
        """
        self._serve = serve
        self._library.send(self._address, order, gate, _SENT)

    @property
    def is_sent(self) -> bool:
        """Whether it is on its way."""
        return bool(self.errand.state)

    def has_made(self, steps: int) -> bool:
        """Whether the chain it was sent for, of so many steps, is made. On any thread, until ``serve`` has returned."""
        return bool(self.errand.done == steps)

    def recall(self) -> None:
        """Have it idle again: whoever was to send it was broken off before that."""
        self._clear()
        give_back(self)

    def decide(self, gate: int) -> None:
        """Open the gate or shut it, see runner.c. The first decision holds."""
        self._library.decide(self._address + _GATE, gate)

    def is_here(self) -> bool:
        """Whether it may need this thread's processor: it has begun there, or nowhere yet."""
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
        self._clear()
        self.thread.name = IDLE_NAME
        signal.sigtimedwait([KICK_SIGNAL], 0)

    def _clear(self) -> None:
        errand, mask = self.errand, self.errand.mask
        ctypes.memset(self._address, 0, ctypes.sizeof(Errand))
        errand.mask = mask
        self._serve = None


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
    """See to it that there is one soon, where the native library is. Blocks while a thread starts. Raises HostError."""
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
