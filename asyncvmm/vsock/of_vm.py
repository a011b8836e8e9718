"""Vsock: the guest's sockets as ``vm.vsock``, whatever machine is underneath.

async with await vm.vsock.connect(1024) as stream: ...
async with vm.vsock.listen(1025) as listener: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from asyncvmm.errors import StateError

if TYPE_CHECKING:
    from asyncvmm.vsock.host import VsockHost
    from asyncvmm.vsock.listener import VsockListener
    from asyncvmm.vsock.stream import VsockStream

CONNECT_TIMEOUT_S: Final = 10.0


class Vsock:
    """``find`` gives the machine's end of the sockets; None where there is none, or no machine yet."""

    def __init__(self, find: Callable[[], VsockHost | None]) -> None:
        self._find = find

    async def connect(self, port: int, *, timeout: float | None = CONNECT_TIMEOUT_S) -> VsockStream:
        """A connection to ``port`` of the guest, an anyio byte stream. ``timeout``: seconds for the guest's answer.

        Raises VsockRefused, VsockTimeout, ConfigError for what is no port, StateError without a started VM that has a
        vsock device.
        """
        return await self._host().connect(port, timeout=timeout)

    def listen(self, port: int, *, backlog: int = 128) -> VsockListener:
        """Take the guest's connections to ``port`` of the host (CID 2).

        Raises ConfigError for what is no port or has a listener, StateError as ``connect``.
        """
        return self._host().listen(port, backlog=backlog)

    def _host(self) -> VsockHost:
        host = self._find()
        if host is None:
            raise StateError("vsock", expected="a started VM with VMConfig(vsock=...)", found="no vsock device")
        return host
