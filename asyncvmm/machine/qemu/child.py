"""A child process that cannot outlive us, watched by its pidfd: no signal handlers, no polling."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Self

from asyncvmm.errors import HostError, MachineError
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.spawning import Spawned, spawn

STDERR_TAIL = 4096
"""Bytes of the child's last error output that are kept."""

_CONTENTION = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EBUSY, errno.ENFILE})


class Child:
    """A running child, made by ``start``. ``status`` is its exit status (negative: minus the signal), None while it
    lives. The kernel kills it when this process ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stderr: Channel, spawned: Spawned) -> None:
        self._loop = loop
        self._stderr = stderr
        self._tail = b""
        self._process = spawned.process
        self._pidfd = spawned.pidfd
        self.pid = spawned.process.pid
        self.status: int | None = None
        self._stderr.watch(self._read_stderr)

    @classmethod
    async def start(cls, command: Sequence[str], descriptors: Sequence[int]) -> Self:
        """Start ``command`` with ``descriptors``, which must stay open until then. The loop goes on meanwhile.

        A cancellation is heard once that is done, and leaves nothing. Raises HostError, MachineError.
        """
        loop = asyncio.get_running_loop()
        stderr = Channel(loop)
        try:
            spawned = await _spawn(command, descriptors, stderr.peer.fileno())
        except BaseException:
            stderr.close()
            raise
        stderr.peer.close()
        return cls(loop, stderr, spawned)

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


async def _spawn(command: Sequence[str], descriptors: Sequence[int], stderr: int) -> Spawned:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise HostError("setpriv", expected="setpriv of util-linux on PATH", found="none")
    try:
        # Its own session: Ctrl-C at the terminal is for us, who then end the guest in order.
        return await spawn([setpriv, "--pdeathsig", "KILL", "--", *command], descriptors, stderr)
    except OSError as error:
        raise start_error("QEMU could not be started", str(error), retryable=error.errno in _CONTENTION) from error


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
