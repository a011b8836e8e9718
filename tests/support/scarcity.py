"""A process that may open few more files, or start few more threads; and that nothing is left of what failed so."""

from __future__ import annotations

import asyncio
import gc
import itertools
import resource
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.support.holdings import Holdings

NO_SUCH_STACK = 1 << 62
"""More than there are addresses for: the kernel refuses a thread with such a stack, whoever asks."""


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Only so many more can be had in the block, by whichever thread."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (number for number in itertools.count() if not Path(f"/proc/self/fd/{number}").is_symlink())
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def threads_left(count: int) -> Iterator[None]:
    """Only so many more can be started in the block, by whichever thread."""
    start, left, lock = threading.Thread.start, itertools.count(count, -1), threading.Lock()

    def scarce(self: threading.Thread) -> None:
        with lock:
            threading.stack_size(0 if next(left) > 0 else NO_SUCH_STACK)
            start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", scarce)
        try:
            yield
        finally:
            threading.stack_size(0)


@asynccontextmanager
async def busy_workers() -> AsyncIterator[None]:
    """All worker threads that there are have something else to do."""
    over, busy = threading.Event(), list[asyncio.Future[bool]]()
    try:
        with threads_left(0):
            while not busy or not busy[-1].done():
                busy.append(asyncio.ensure_future(anyio.to_thread.run_sync(over.wait)))
                await asyncio.wait(busy[-1:], timeout=0.02)
        assert isinstance(busy.pop().exception(), RuntimeError)
        yield
    finally:
        over.set()
        await asyncio.gather(*busy)


async def nothing_more_is_held_than(before: Holdings, now: Callable[[], Holdings]) -> None:
    """What refers to an error may go a little later. Tasks do not count: the one that looks for stalls opens files."""
    with anyio.move_on_after(5):
        while _more_than(before, now()):
            gc.collect()
            await anyio.sleep(0.01)
    assert not _more_than(before, now())


def _more_than(before: Holdings, now: Holdings) -> list[object]:
    return [
        *Counter(dict(now.descriptors)) - Counter(dict(before.descriptors)),
        *Counter(now.threads) - Counter(before.threads),
        *Counter(now.mappings) - Counter(before.mappings),
        *now.children - before.children,
        *set(now.files) - set(before.files),
    ]
