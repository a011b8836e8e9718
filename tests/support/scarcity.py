"""A process that may open few more files, or start few more threads; and that nothing is left of what failed so."""

from __future__ import annotations

import asyncio
import gc
import itertools
import resource
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import attrs
import pytest

from asyncvmm import VM, DriveConfig, VMConfig
from tests.support.holdings import Holdings

MEMORY_MIB = 71
"""A size that no other mapping has."""

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


@asynccontextmanager
async def workers_left(count: int) -> AsyncIterator[None]:
    """Only so many can be had in the block."""
    async with busy_workers():
        with threads_left(count):
            yield


# -- VMs ---------------------------------------------------------------------------------------------------------------


def echoing_config(kernel: Path, *, disk: Path | None) -> VMConfig:
    """Of tests/guests/kvm/foreign.S that echoes; with devices, one of them a ``disk`` that is made, or without."""
    config = VMConfig(kernel=kernel, cmdline="RE", memory_mib=MEMORY_MIB, accel="kvm")
    if disk is None:
        return config
    disk.write_bytes(bytes(1 << 20))
    return attrs.evolve(config, drives=[DriveConfig(path=disk, overlay=True)], vsock=True)


async def booted(config: VMConfig) -> VM:
    """A VM, running."""
    vm = VM(config)
    await vm.boot()
    return vm


async def errors_until_it_can_be(
    make: Callable[[], Awaitable[VM]], left: Callable[[int], AbstractAsyncContextManager[None]]
) -> list[Exception]:
    """What comes with none of what is scarce ``left``, with one, and so on until there are enough; nothing else is
    left of it. ``make`` gives a VM with an ``echoing_config``."""
    errors: list[Exception] = []
    while True:
        async with await make():  # what is kept for a coming one is there again
            await anyio.sleep(0.02)
        gc.collect()
        before = held()
        try:
            async with left(len(errors)):
                vm = await make()
        except Exception as error:
            errors.append(error.with_traceback(None))
            await nothing_more_is_held_than(before)
        else:
            await vm.stop()
            assert errors, "nothing was scarce"
            return errors


def out_of_kind(errors: list[Exception], *kinds: type[Exception], saying: str = "") -> list[Exception]:
    """Those that are of no such kind, or do not say so."""
    return [error for error in errors if not isinstance(error, kinds) or saying not in str(error)]


# -- what is left ------------------------------------------------------------------------------------------------------


def held() -> Holdings:
    """What there is now, of VMs with an ``echoing_config`` as well."""
    return Holdings.now(MEMORY_MIB << 20)


async def nothing_more_is_held_than(before: Holdings) -> None:
    """What refers to an error may go a little later. Tasks do not count: the one that looks for stalls opens files."""
    with anyio.move_on_after(5):
        while _more_than(before, held()):
            gc.collect()
            await anyio.sleep(0.01)
    assert not _more_than(before, held())


def _more_than(before: Holdings, now: Holdings) -> list[object]:
    return [
        *Counter(dict(now.descriptors)) - Counter(dict(before.descriptors)),
        *Counter(now.threads) - Counter(before.threads),
        *Counter(now.mappings) - Counter(before.mappings),
        *now.children - before.children,
        *set(now.files) - set(before.files),
    ]
