"""Unix sockets in front of a guest's ports, in the convention that Firecracker made (its docs/vsock.md).

- Who connects to ``uds_path`` and writes ``CONNECT <port>\n`` gets ``OK <host port>\n``, and from then on speaks to
  that port of the guest; where the guest refuses, the socket is closed.
- The guest's connections to host port P go to who listens on ``uds_path_P``; where nobody does, they are refused.

Nothing is kept in between but one read's worth each way: a slow reader slows the other side.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import anyio

from asyncvmm.devices.virtio.vsock.connection import Connection
from asyncvmm.errors import AsyncVMMError, ConfigError
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.relay import Relay

SUN_PATH: Final = 108
"""Bytes of a unix socket's path, with its NUL (unix(7))."""

MODE: Final = 0o600
"""Who may use the socket: its owner."""

BACKLOG: Final = 128
MAX_CLIENTS: Final = 1024
"""Clients at a time; further ones wait in the socket's backlog."""

HANDSHAKE_TIMEOUT_S: Final = 10.0
_LONGEST_REQUEST = 32
_LONGEST_SUFFIX = len("_4294967295")
_CONNECT = re.compile(rb"CONNECT +([0-9]{1,10})\r?\n", re.IGNORECASE)
_PAUSE_S = 0.1


class UnixSockets:
    """The socket at ``path``, and those with ``_<port>`` behind its name, for ``host``.

    ``start`` and ``aclose`` belong on the loop.
    """

    def __init__(self, host: VsockHost, path: Path, metrics: VsockMetrics) -> None:
        self._host = host
        self._path = path
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_CLIENTS)
        self._listening: socket.socket | None = None
        self._identity: tuple[int, int] | None = None

    def start(self) -> None:
        """Make the socket and serve it. Raises ConfigError where there cannot be one."""
        self._listening = _listen(self._path)
        self._identity = _identity(self._path)
        self._host.fallback = self._requested
        self._spawn(self._accept(self._listening))

    async def aclose(self) -> None:
        """End every connection that came by a unix socket, and remove the socket file if it is still ours."""
        self._host.fallback = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listening is not None:
            self._listening.close()
            self._listening = None
            if self._identity == _identity(self._path):
                self._path.unlink(missing_ok=True)

    def _spawn(self, work: Coroutine[Any, Any, None], *afterwards: Callable[[], object]) -> None:
        """Run ``work``, then what has to be done ``afterwards``, even if it is cancelled before its first step."""

        def finish(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            for step in afterwards:
                step()

        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(finish)

    # -- the host's clients --------------------------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            await self._room.acquire()
            try:
                client, _ = await self._loop.sock_accept(listening)
            except OSError:  # no descriptors left, or the client has gone already
                self._metrics.muxer_event_fails += 1
                self._room.release()
                await asyncio.sleep(_PAUSE_S)
            except BaseException:
                self._room.release()
                raise
            else:
                client.setblocking(False)
                self._spawn(self._serve(client), client.close, self._room.release)

    async def _serve(self, client: socket.socket) -> None:
        try:
            await self._connect(client)
        except (AsyncVMMError, OSError, ValueError):
            self._metrics.conn_event_fails += 1

    async def _connect(self, client: socket.socket) -> None:
        """Raises AsyncVMMError, OSError, or ValueError for a request that is none."""
        with anyio.fail_after(HANDSHAKE_TIMEOUT_S):
            port, rest = await self._read_request(client)
        connection = await self._host.open(port)
        try:
            await self._loop.sock_sendall(client, f"OK {connection.local_port}\n".encode())
            await Relay(self._host.device, connection, client, self._metrics).run(rest)
        finally:
            self._host.release(connection)

    async def _read_request(self, client: socket.socket) -> tuple[int, bytes]:
        """The guest's port, and what the client said behind its request."""
        text = b""
        while b"\n" not in text and len(text) < _LONGEST_REQUEST:
            data = await self._loop.sock_recv(client, _LONGEST_REQUEST)
            if not data:
                break
            text += data
        match = _CONNECT.match(text)
        if match is None:
            raise ValueError("not a request to connect")
        return int(match[1]), text[match.end() :]

    # -- the guest's connections ---------------------------------------------------------------------------------------

    def _requested(self, connection: Connection) -> bool:
        """See host.Fallback. Connecting to a unix socket is done at once, or not at all."""
        try:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # no descriptors left
            self._metrics.muxer_event_fails += 1
            return False
        try:
            client.connect(f"{self._path}_{connection.local_port}")
        except OSError:
            client.close()
            return False
        self._spawn(self._relay_guest(connection, client), client.close, lambda: self._host.release(connection))
        return True

    async def _relay_guest(self, connection: Connection, client: socket.socket) -> None:
        relay = Relay(self._host.device, connection, client, self._metrics)
        with self._host.device.host():
            connection.accept()
        await relay.run()


def _listen(path: Path) -> socket.socket:
    longest = SUN_PATH - 1 - _LONGEST_SUFFIX
    if len(os.fsencode(path)) > longest:
        raise ConfigError("vsock uds_path", expected=f"at most {longest} bytes", found=f"{len(os.fsencode(path))}")
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The file is made with the socket's own mode: at no moment can others connect.
        os.fchmod(listening.fileno(), MODE)
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            "vsock uds_path", expected="a place for a socket", found=f"{path}: {error.strerror}"
        ) from error
    return listening


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more. Raises ConfigError for anything else that is there."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("vsock uds_path", expected="nothing there, or a socket", found=f"another file at {path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            found = error.strerror
        else:
            found = "one that is in use"
    raise ConfigError("vsock uds_path", expected="a free socket", found=f"{found}: {path}")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
