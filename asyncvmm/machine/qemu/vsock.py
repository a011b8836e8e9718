"""The socket device of a QEMU: its registers are QEMU's, its queues are served here over vhost-user.

So the host's end is the KVM machine's: the same device, the same VsockHost, the same unix sockets.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from asyncvmm.device_config import VsockConfig
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.errors import MachineError
from asyncvmm.machine.device_faults import FaultReport
from asyncvmm.machine.qemu.vhost_user.server import VhostUserServer
from asyncvmm.metrics.virtio import VsockMetrics
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.uds import UnixSockets

Fail = Callable[[Exception], None]

_log = logging.getLogger("asyncvmm.devices")


class QemuVsock:
    """``host`` is the host's end, ``peer`` the socket for QEMU. ``vm``: the VM's name, for the log. ``fail`` hears
    of an error of ours. Made on the loop.

    Raises MachineError when there are no descriptors left.
    """

    def __init__(self, config: VsockConfig, metrics: VsockMetrics, fail: Fail, *, vm: str = "") -> None:
        try:
            ours, self.peer = socket.socketpair()
        except OSError as error:
            raise MachineError("socket pair", expected="two free descriptors", found=error.strerror) from error
        device = VirtioVsock(config.cid, metrics)
        self._server = VhostUserServer(device, ours, on_end=self._on_end, gave_up=FaultReport("vsock", vm), fail=fail)
        self.host = VsockHost(device)
        self._sockets: UnixSockets | None = None
        if config.uds_path is not None:
            self._sockets = UnixSockets(self.host, config.uds_path, metrics)

    def start(self) -> None:
        """Make the unix socket, if one was asked for. Raises ConfigError."""
        if self._sockets is not None:
            self._sockets.start()

    def close(self) -> None:
        """QEMU has ended, or never was: end every connection. May be called again."""
        self.peer.close()
        self.host.close()
        self._server.close()

    async def aclose(self) -> None:
        """Free the rest: the unix socket and whoever came by it. May be called again."""
        self.close()
        if self._sockets is not None:
            await self._sockets.aclose()

    def _on_end(self, why: str) -> None:
        """Mostly because QEMU ends. One that broke the protocol goes on without the device."""
        _log.info("the socket device of a QEMU has ended: %s", why)
        self.host.close()
