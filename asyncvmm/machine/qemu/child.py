"""A child process that cannot outlive us, watched by its pidfd: no threads, no signal handlers, no polling."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence

from asyncvmm.errors import HostError, MachineError
from asyncvmm.machine.qemu.channel import Channel

STDERR_TAIL = 4096
"""Bytes of the child's last error output that are kept."""

_CONTENTION = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EBUSY, errno.ENFILE})


class Child:
    """A running child. ``status`` is its exit status (negative: minus the signal), None while it lives.

    Must be made on the thread that runs the event loop: the kernel kills the child when the *thread* that made it
    ends (PR_SET_PDEATHSIG), and worker threads end early. Nor would another thread spare the loop anything: Python
    forks with the interpreter locked. It is a vfork, 0.1 ms long however large this process is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, command: Sequence[str], descriptors: Sequence[int]) -> None:
        self._loop = loop
        self.status: int | None = None
        self._stderr = Channel(loop)
        self._tail = b""
        try:
            self._process = _spawn(command, descriptors, self._stderr.peer.fileno())
            self._pidfd = _open_pidfd(self._process)
        except BaseException:
            self._stderr.close()
            raise
        self._stderr.peer.close()
        self.pid = self._process.pid
        self._stderr.watch(self._read_stderr)

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Call ``on_exit`` on the loop once, when the child has ended; ``status`` is known then."""

        def exited() -> None:
            self._loop.remove_reader(self._pidfd)
            self.reap()
            on_exit()

        self._loop.add_reader(self._pidfd, exited)

    def kill(self) -> None:
        """Send SIGKILL, unless the child has been reaped already."""
        if self.status is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def reap(self) -> None:
        """Collect a child that has ended, with its last words, and free its descriptors."""
        self.status = self._process.wait()
        os.close(self._pidfd)
        while self._read_stderr():
            pass
        self._stderr.close()

    def last_words(self) -> str:
        """The last line of the child's error output, empty if it said nothing."""
        lines = self._tail.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def describe_end(self) -> str:
        """How it ended, in one line."""
        status = self.status or 0
        how = f"ended by {_signal_name(-status)}" if status < 0 else f"exit status {status}"
        words = self.last_words()
        return f"QEMU: {how}: {words}" if words else f"QEMU: {how}"

    def _read_stderr(self) -> bool:
        data = self._stderr.read()
        self._tail = (self._tail + data)[-STDERR_TAIL:]
        return bool(data)


def _spawn(command: Sequence[str], descriptors: Sequence[int], stderr: int) -> subprocess.Popen[bytes]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise HostError("setpriv", expected="setpriv of util-linux on PATH", found="none")
    try:
        return subprocess.Popen(
            [setpriv, "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=tuple(descriptors),
            # Its own session: Ctrl-C at the terminal is for us, who then end the guest in order.
            start_new_session=True,
        )
    except OSError as error:
        raise start_error("QEMU could not be started", str(error), retryable=error.errno in _CONTENTION) from error


def _open_pidfd(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError as error:
        process.kill()
        process.wait()
        raise start_error("QEMU could not be watched", str(error), retryable=False) from error


def start_error(what: str, found: str, *, retryable: bool) -> MachineError:
    """A MachineError of the start; ``retryable`` where the same start may succeed a moment later."""
    error = MachineError(what, expected="a running QEMU", found=found)
    error.retryable = retryable
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
