"""What QEMU's devices stand on, on our side: drives opened, sockets paired, the other half of vhost-user."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from asyncvmm.errors import DriveError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.devices import CONSOLE, DeviceEnds, DriveEnd
from asyncvmm.machine.qemu.ports import ChannelStream
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.storage.lock import lock_image
from asyncvmm.storage.ranges import size_of

if TYPE_CHECKING:
    from asyncvmm.device_config import DriveConfig
    from asyncvmm.machine.qemu.vsock import QemuVsock


class Attachments:
    """Everything that belongs to the devices of one QEMU but is ours. ``ports`` by name, ``console`` first; ``vsock``
    is None without a socket device."""

    def __init__(self, plan: BootPlan, metrics: VmMetrics) -> None:
        self._plan = plan
        self._metrics = metrics
        self._drives: list[DriveEnd] = []
        self._channels: dict[str, Channel] = {}
        self.ports: dict[str, ChannelStream] = {}
        self.vsock: QemuVsock | None = None

    @property
    def channels(self) -> Collection[Channel]:
        """The sockets of the console's ports, once ``connect`` was called."""
        return self._channels.values()

    def open_drives(self) -> None:
        """Open every drive for QEMU. Blocking. Raises DriveError, DriveBusy; ``close`` frees what was opened."""
        for drive in self._plan.resources.drives:
            self._drives.append(_open_drive(drive.config, drive.path))
            if drive.overlay is not None:
                drive.overlay.drop_name()

    def connect(self, loop: asyncio.AbstractEventLoop, fail: Callable[[Exception], None]) -> DeviceEnds:
        """Pair the sockets; QEMU's ends of everything. ``fail`` hears of an error of ours.

        Raises ConfigError (a unix socket that cannot be), MachineError when there are no descriptors left.
        """
        console = self._plan.devices.console
        for name in () if console is None else (CONSOLE, *console.ports):
            channel = self._channels[name] = Channel(loop)
            self.ports[name] = ChannelStream(name, channel)
        ports = {name: channel.peer.fileno() for name, channel in self._channels.items()}
        return DeviceEnds(drives=tuple(self._drives), ports=ports, vsock=self._connect_vsock(fail))

    def _connect_vsock(self, fail: Callable[[Exception], None]) -> int | None:
        config = self._plan.devices.vsock
        if config is None:
            return None
        from asyncvmm.machine.qemu.vsock import QemuVsock

        self.vsock = QemuVsock(config, self._metrics.vsock, fail, vm=self._plan.name)
        self.vsock.start()
        return self.vsock.peer.fileno()

    def release_ends(self) -> None:
        """QEMU has its ends: close ours of them. May be called again."""
        while self._drives:
            os.close(self._drives.pop().fd)
        for channel in self._channels.values():
            channel.peer.close()
        if self.vsock is not None:
            self.vsock.peer.close()

    def close(self) -> None:
        """QEMU has ended: free what that needs no waiting for. Who waits at a port is woken, and may read what it left.
        May be called again."""
        self.release_ends()
        for port in self.ports.values():
            port.finish()
        if self.vsock is not None:
            self.vsock.close()

    async def aclose(self) -> None:
        """Free everything. May be called again."""
        self.close()
        if self.vsock is not None:
            await self.vsock.aclose()


def _open_drive(config: DriveConfig, path: Path) -> DriveEnd:
    """Locked as QEMU will lock it itself, but with an error that says so before there is a QEMU."""
    access = os.O_RDONLY if config.read_only else os.O_RDWR
    what, expected = f"drive {config.id}", f"a file or block device to {'read' if config.read_only else 'write'}"
    try:
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO could keep its opener waiting
    except OSError as error:
        raise DriveError(what, expected=expected, found=f"{path}: {os.strerror(error.errno or 0)}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise DriveError(what, expected=expected, found=f"{path}: neither")
        if not size_of(fd):
            raise DriveError(what, expected="an image that is not empty", found=str(path))
        lock_image(fd, path, writer=not config.read_only)
    except BaseException:
        os.close(fd)
        raise
    return DriveEnd(fd, stat.S_ISBLK(mode))
