"""Starting a program while the event loop goes on: posix_spawn(3), on a thread that lasts.

Whoever starts a process is kept until that has executed its program, which a busy processor or a slow disk delays by
tens of milliseconds. Python's own ways (subprocess, os.posix_spawn) keep the interpreter locked as long, so another
thread alone would spare the loop nothing: the C library is called here, with the interpreter let go.

The kernel kills a child when the *thread* that made it ends (PR_SET_PDEATHSIG), and worker threads end early. So there
is one thread for it that ends with the process. The facts: prctl(2); spawni.c of glibc and posix_spawn.c of musl.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import attrs

from asyncvmm.machine.waiting import wait_out

T = TypeVar("T")

THREAD_NAME: Final = "asyncvmm starter"

_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
_OPAQUE_BYTES: Final = 1024
"""Room for one of the C library's records, the largest of which has 336 bytes."""

_SIGSET_BYTES: Final = 128

_short: Any = ctypes.PyDLL(None)
_long: Any = ctypes.CDLL(None)


@attrs.frozen
class Spawned:
    """A child that was started: its process id, and a descriptor of it (pidfd_open(2)) that is the owner's to close."""

    pid: int
    pidfd: int

    def discard(self) -> None:
        """Kill it, reap it, close the descriptor. Blocking."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        reap(self.pid)


async def spawn(command: Sequence[str], descriptors: Sequence[int], stderr: int) -> Spawned:
    """Start the program at the path ``command[0]``, in a session of its own. It has ``descriptors``, by their numbers,
    and of others only its standard error; /dev/null is its input and output.

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
    with _record("posix_spawn_file_actions") as actions, _record("posix_spawnattr") as attributes:
        _redirect(actions, descriptors, stderr)
        _set_signals(attributes)
        pid = _posix_spawn(command, actions, attributes)
    try:
        return Spawned(pid, os.pidfd_open(pid))
    except OSError:
        os.kill(pid, signal.SIGKILL)
        reap(pid)
        raise


def reap(pid: int) -> int:
    """Wait for a child's end; its exit status, negative: minus the signal. 0 where somebody else has reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


# -- the thread ------------------------------------------------------------------------------------------------------


class _Thread:
    """Carries out one call after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._main, name=THREAD_NAME, daemon=True).start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """What ``function`` returned or raised, once it was called there."""
        outcome: Future[T] = Future()

        def carry_out() -> None:
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


# -- the call --------------------------------------------------------------------------------------------------------


def _posix_spawn(command: Sequence[str], actions: Any, attributes: Any) -> int:
    words, pid = _strings([os.fsencode(word) for word in command]), ctypes.c_int()
    environment = _strings([name + b"=" + value for name, value in os.environb.items()])
    code = _long.posix_spawn(ctypes.byref(pid), words[0], actions, attributes, words, environment)
    if code:
        raise OSError(code, os.strerror(code), command[0])
    return pid.value


def _strings(words: Sequence[bytes]) -> Any:
    """An array of C strings, NULL behind them. Raises ValueError."""
    if any(b"\0" in word for word in words):
        raise ValueError("embedded null byte")
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


def _redirect(actions: Any, descriptors: Sequence[int], stderr: int) -> None:
    """``stderr`` first: its number may be one of the other two."""
    change = "posix_spawn_file_actions"
    _call(f"{change}_adddup2", actions, stderr, 2)
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        _call(f"{change}_addopen", actions, number, b"/dev/null", flags, 0)
    for kept in descriptors:
        _call(f"{change}_adddup2", actions, kept, kept)  # which has it inherited
    for other in _inheritable() - {0, 1, 2, *descriptors}:
        _call(f"{change}_addclose", actions, other)


def _inheritable() -> set[int]:
    """Descriptors that a program inherits unasked. None of ours is; but we may have inherited some."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the directory's own
            if os.get_inheritable(int(entry)):
                found.add(int(entry))
    return found


def _set_signals(attributes: Any) -> None:
    """Nothing is blocked in the program, and what Python ignores for itself has its usual effect."""
    none, usual = ctypes.create_string_buffer(_SIGSET_BYTES), ctypes.create_string_buffer(_SIGSET_BYTES)
    _call("sigemptyset", none)
    _call("sigemptyset", usual)
    for number in _IGNORED_BY_PYTHON:
        _call("sigaddset", usual, int(number))
    _call("posix_spawnattr_setsigmask", attributes, none)
    _call("posix_spawnattr_setsigdefault", attributes, usual)
    _call("posix_spawnattr_setflags", attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))


@contextmanager
def _record(kind: str) -> Iterator[Any]:
    """One of the C library's records, made and destroyed."""
    record = (ctypes.c_uint64 * (_OPAQUE_BYTES // 8))()
    _call(f"{kind}_init", record)
    try:
        yield record
    finally:
        _call(f"{kind}_destroy", record)


def _call(name: str, *arguments: Any) -> None:
    """A function that returns an error's number. It takes no time, and letting the interpreter go for it would."""
    code = getattr(_short, name)(*arguments)
    if code:
        raise OSError(code, os.strerror(code), name)
