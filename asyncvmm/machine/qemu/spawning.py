"""Starting a process while the event loop goes on: on a thread of its own, which lasts.

Whoever starts a process is kept until that has executed its program, which a busy processor or a slow disk delays by
tens of milliseconds. ``subprocess`` lets the interpreter go meanwhile (CPython from 3.11.4 on; ``os.posix_spawn`` does
not), so that another thread spares the loop the wait. But the kernel kills a child when the *thread* that made it ends
(PR_SET_PDEATHSIG, see prctl(2)), and worker threads end early: hence one thread that ends with the process.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Final, TypeVar

import attrs

from asyncvmm.machine.waiting import wait_out

T = TypeVar("T")

THREAD_NAME: Final = "asyncvmm starter"


@attrs.frozen
class Spawned:
    """A child that was started, and a descriptor of it (pidfd_open(2)) that is the owner's to close."""

    process: subprocess.Popen[bytes]
    pidfd: int

    def discard(self) -> None:
        """Kill it, reap it, close the descriptor. Blocking."""
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)


async def spawn(command: Sequence[str], descriptors: Sequence[int], stderr: int) -> Spawned:
    """Start a program in a session of its own. It has ``descriptors``, by their numbers, and of others only its
    standard error; /dev/null is its input and output.

    A cancellation is heard once that is done, and leaves no process. Raises OSError.
    """
    thread = _thread()
    call = asyncio.wrap_future(thread.call(lambda: spawn_blocking(command, descriptors, stderr)))
    try:
        await wait_out(call)
    except asyncio.CancelledError:
        if call.exception() is None:
            await wait_out(asyncio.wrap_future(thread.call(call.result().discard)))
        raise
    return call.result()


def spawn_blocking(command: Sequence[str], descriptors: Sequence[int], stderr: int) -> Spawned:
    """As ``spawn``, for the time it takes."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=tuple(descriptors),
        start_new_session=True,
    )
    try:
        return Spawned(process, os.pidfd_open(process.pid))
    except OSError:
        process.kill()
        process.wait()
        raise


class _Thread:
    """Carries out one call after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._main, name=THREAD_NAME, daemon=True).start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """What ``function`` returned or raised, once it was called there."""
        outcome: Future[T] = Future()

        def carry_out() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)

        self._calls.put(carry_out)
        return outcome

    def _main(self) -> None:
        while True:
            self._calls.get()()


@functools.cache
def _thread() -> _Thread:
    """Made when it is first needed, and for good. Raises OSError where there can be no more threads."""
    try:
        return _Thread()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error


os.register_at_fork(after_in_child=_thread.cache_clear)  # a child has none of the threads
