"""What a VM's devices stand on, made ready on the host before there is a machine: overlays, the network's other end.

The same for both machines. It belongs to one boot attempt, and is freed after the machine that used it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from asyncvmm.device_config import DeviceConfig, DriveConfig, NetConfig
from asyncvmm.machine.base import AccelName, DriveResource, Resources
from asyncvmm.machine.waiting import in_thread, in_thread_or_here
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.storage.overlay import Overlay

_log = logging.getLogger("asyncvmm.resources")


@attrs.frozen(kw_only=True)
class SavedResources:
    """What a snapshot has of its VM's resources. drives: what ``save_drives`` gave. open_file: opens a file of the
    snapshot by its name, to be read. mac: the network card's address."""

    drives: object
    open_file: Callable[[str], int]
    mac: str | None = None


class HostResources:
    """``record`` is what the machine is given. ``aclose`` frees everything, also half-way."""

    def __init__(self) -> None:
        self.record = Resources()
        self._undo = AsyncExitStack()

    async def make_ready(
        self, devices: DeviceConfig, accel: AccelName, timeline: Timeline, saved: SavedResources | None = None
    ) -> None:
        """Make overlays and the network; ``saved``: for a VM that is restored.

        Cancelled or failed, it leaves to ``aclose`` what is there. Raises ConfigError and HostError, with their kinds:
        what was asked for cannot be had; SnapshotDamaged and SnapshotMismatch where it is not what was saved.
        """
        await self._make_overlays(devices, accel, timeline, saved)
        if devices.net is not None:
            await self._connect(devices.net, timeline, saved.mac if saved is not None else None)

    async def _make_overlays(
        self, devices: DeviceConfig, accel: AccelName, timeline: Timeline, saved: SavedResources | None
    ) -> None:
        if saved is not None:
            with timeline.phase("overlay") if devices.drives else nullcontext():
                drives = await in_thread(lambda: self._ready_again(devices, accel, saved))
        elif any(drive.overlay for drive in devices.drives):
            with timeline.phase("overlay"):
                drives = await in_thread(lambda: [self._ready(drive, accel) for drive in devices.drives])
        else:
            drives = [DriveResource(drive, drive.path) for drive in devices.drives]
        self.record = attrs.evolve(self.record, drives=tuple(drives))

    def _ready(self, drive: DriveConfig, accel: AccelName) -> DriveResource:
        """On a worker thread."""
        from asyncvmm.storage.opening import of_drive
        from asyncvmm.storage.overlay import make_overlay

        if drive.overlay is False:
            return DriveResource(drive, drive.path)
        target = drive.overlay if isinstance(drive.overlay, Path) else None
        with of_drive(drive):
            overlay = make_overlay(drive.path, target, for_qemu=accel == "qemu")
        self._remove_at_end(overlay)
        return DriveResource(drive, overlay.path or drive.path, overlay.format, overlay)

    def _ready_again(self, devices: DeviceConfig, accel: AccelName, saved: SavedResources) -> list[DriveResource]:
        """On a worker thread."""
        if not devices.drives and saved.drives == []:
            return []
        from asyncvmm.storage.snapshot import restored_drives

        drives = restored_drives(saved.drives, devices.drives, saved.open_file, for_qemu=accel == "qemu")
        for drive in drives:
            if drive.overlay is not None:
                self._remove_at_end(drive.overlay)
        return drives

    def _remove_at_end(self, overlay: Overlay) -> None:
        self._undo.push_async_callback(in_thread_or_here, lambda: _remove(overlay))

    async def _connect(self, net: NetConfig, timeline: Timeline, mac: str | None = None) -> None:
        from asyncvmm.net.mac import draw_mac, format_mac

        mac = mac or net.mac or format_mac(draw_mac())
        if (tap := net.tap) is not None:
            fd = await in_thread(lambda: self._open_tap(tap))
        else:
            from asyncvmm.net.user import start_user_net

            with timeline.phase("network_helper"):
                helper = await start_user_net(net, mac)
            self._undo.push_async_callback(helper.aclose)
            fd = helper.fd
        self.record = attrs.evolve(self.record, net_fd=fd, mac=mac)

    def _open_tap(self, name: str) -> int:
        """On a worker thread: making an interface takes its time."""
        from asyncvmm.net.tap import open_tap

        fd = open_tap(name)
        self._undo.callback(os.close, fd)
        return fd

    async def aclose(self) -> None:
        """Free everything. May be called again."""
        await self._undo.pop_all().aclose()


def _remove(overlay: Overlay) -> None:
    """On a worker thread: the file system may have gigabytes to free."""
    try:
        overlay.remove()
    except OSError as error:
        _log.error("the overlay %s stays: %s", overlay.path, error.strerror)
