"""Waiting for what must finish, although the waiting task is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from asyncvmm.machine.threads import run_in_thread

T = TypeVar("T")


async def wait_out(future: asyncio.Future[Any]) -> None:
    """Until ``future`` is done, come what may; then raise the cancellation that came meanwhile, if any.

    anyio's shield alone is not enough: it does not hold off ``asyncio.Task.cancel``.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # counts as seen, or asyncio would complain of it later
        raise cancelled


async def in_thread(function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """Call a blocking function in a worker thread; a cancellation is heard once it has returned.

    ``undo``, in such a thread as well, takes back a result that nobody is left to take. Raises HostError where no
    thread is to be had.
    """
    call = asyncio.ensure_future(run_in_thread(function))
    try:
        await wait_out(call)
    except asyncio.CancelledError:
        if undo is not None and not call.cancelled() and call.exception() is None:
            undoing, result = undo, call.result()
            await in_thread_or_here(lambda: undoing(result))
        raise
    return call.result()


async def in_thread_or_here(function: Callable[[], T]) -> T:
    """The same for what must be done whatever is to be had, such as to free: without a thread the loop does it."""
    call = asyncio.ensure_future(run_in_thread(function, or_here=True))
    await wait_out(call)
    return call.result()
