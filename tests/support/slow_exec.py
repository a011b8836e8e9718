"""A program whose start takes as long as a test wants: the kernel keeps who executes it waiting in execve(2).

Another process holds a lease on the program's file (fcntl(2), F_SETLEASE), and whoever opens it waits until that is
given back. The holder says when it is asked to; if it hears no answer it gives the lease back by itself, so that a
process that stands still meanwhile, and cannot answer, does not stand still for good.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = """
import fcntl, os, select, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
file = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
os.write(1, b"held")
signal.sigwait({signal.SIGIO})
os.write(1, b"asked")
answered, _, _ = select.select([0], [], [], 3)
os.write(1, b"answered" if answered else b"not answered")
"""


class SlowExec:
    """The holder's end of the conversation, on the loop."""

    def __init__(self, holder: socket.socket) -> None:
        self._holder = holder

    async def begun(self) -> None:
        """Until somebody executes the program, who is in execve(2) then."""
        assert await asyncio.get_running_loop().sock_recv(self._holder, 5) == b"asked"

    async def let_go(self) -> None:
        """Let it be executed. Fails where the loop could not have said so while that was waited for."""
        self._holder.send(b"go on")
        assert await asyncio.get_running_loop().sock_recv(self._holder, 32) == b"answered"


@contextmanager
def slow_exec(program: str, directory: Path) -> Iterator[SlowExec]:
    """A copy of ``program`` in ``directory`` that is slow the first time."""
    found = shutil.which(program)
    assert found is not None
    copy = directory / program
    shutil.copy(found, copy)
    command = [sys.executable, "-c", HOLDER, str(copy)]
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()) as holder:
        try:
            assert ours.recv(4) == b"held"
            ours.setblocking(False)
            yield SlowExec(ours)
        finally:
            holder.kill()
