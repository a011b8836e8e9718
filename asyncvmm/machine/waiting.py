"""Waiting for what must finish, although the waiting task is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

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

    ``undo``, in such a thread as well, takes back a result that nobody is left to take.
    """
    call = asyncio.ensure_future(anyio.to_thread.run_sync(function))
    try:
        await wait_out(call)
    except asyncio.CancelledError:
        if undo is not None and not call.cancelled() and call.exception() is None:
            await wait_out(asyncio.ensure_future(anyio.to_thread.run_sync(undo, call.result())))
        raise
    return call.result()
