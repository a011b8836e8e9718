"""What SIGTERM and SIGHUP do to a command: they end it as Ctrl-C does, so that everything is freed on the way out.

A command that a signal ended has the exit code that a shell gives for it, 128 and the signal's number.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)

_HELD: Final = {signal.SIGINT, *ENDING}


class Ended(KeyboardInterrupt):
    """The signal of that number came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """What a command ends with that was interrupted so."""
    return 128 + (interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Have signals raise Ended where they would kill; one that is ignored, as nohup has it, stays so.

    Without effect on any but the main thread.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = (number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL)
        before = {number: signal.signal(number, _raise) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    raise Ended(number)


@contextmanager
def signals_held(hold: bool = True) -> Iterator[None]:
    """Keep the signals that end a command for later, or let them in for a while.

    An interrupt in the middle of an import can crash an extension module that is just being initialised.
    """
    how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
    before = signal.pthread_sigmask(how, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
