"""The command in processes of its own that need not import everything anew: forked from one that has imported it.

    with ForkServer() as server:
        done = server.run(["boot", "--memory", "1"], env={"TMPDIR": "/tmp/x"})

Run as a program it is that one, which gets requests over a socket: the words, the environment, and where output goes.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Self

_MOST_BYTES = 1 << 17


class ForkServer:
    """Runs commands one after the other. Freed at the end of a ``with`` block."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def run(
        self, words: Sequence[str], env: Mapping[str, str], timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run with captured output, of which there must not be more than a pipe holds."""
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        try:
            request = json.dumps({"words": list(words), "env": dict(env)}).encode()
            socket.send_fds(self._socket, [request], [their_out, their_err])
        finally:
            os.close(their_out)
            os.close(their_err)
        with open(out, encoding="utf-8") as output, open(err, encoding="utf-8") as errors:
            self._socket.settimeout(timeout_s)
            status = int(self._socket.recv(_MOST_BYTES))
            return subprocess.CompletedProcess(list(words), status, output.read(), errors.read())


def _serve(requests: socket.socket) -> list[str]:
    """In each child, that one's words; never returns to the server itself."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _MOST_BYTES, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        child = os.fork()
        if child == 0:
            requests.close()
            os.environ.clear()
            os.environ.update(request["env"])
            for number, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return list(request["words"])
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        requests.send(str(os.waitstatus_to_exitcode(status)).encode())


def _import_everything() -> None:
    import asyncvmm

    for module in pkgutil.walk_packages(asyncvmm.__path__, "asyncvmm."):
        with suppress(ImportError):  # of an extra that is not installed
            import_module(module.name)
    gc.freeze()  # else each child would copy what it looks through


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # else modules beside this file would be found before those they hide
    _import_everything()
    sys.argv = ["asyncvmm", *_serve(socket.socket(fileno=int(sys.argv[1])))]
    from asyncvmm.cli import main

    sys.exit(main())
