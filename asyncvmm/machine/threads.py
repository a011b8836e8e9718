"""Threads, which are not always to be had: at RLIMIT_NPROC, at a control group's pids.max, without room for a stack.

Python says so with a bare RuntimeError, at once; here it is an error in kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

from asyncvmm.errors import HostError

T = TypeVar("T")


def start_thread(thread: threading.Thread) -> None:
    """Start it; waits until it was begun. Raises HostError."""
    try:
        thread.start()
    except RuntimeError as error:
        raise _none_to_be_had(thread.name, error) from error


async def run_in_thread(function: Callable[[], T], *, abandon_on_cancel: bool = False, or_here: bool = False) -> T:
    """As anyio.to_thread.run_sync; where no thread is to be had, ``or_here`` has the loop call ``function``.

    Raises HostError if it was not called, and what it raises.
    """
    was_called = False

    def call() -> T:
        nonlocal was_called
        was_called = True
        return function()

    try:
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel)
    except RuntimeError as error:
        if was_called:
            raise
        if not or_here:
            raise _none_to_be_had("worker", error) from error
    return function()


def _none_to_be_had(name: str, error: RuntimeError) -> HostError:
    return HostError(f"thread {name}", expected="a thread to be had (ulimit -u, pids.max)", found=str(error))
