"""What a VM's devices stand on, made ready on the host before there is a machine: overlays, the network's other end.

The same for both machines. It belongs to one boot attempt, and is freed after the machine that used it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from asyncvmm.device_config import DeviceConfig, DriveConfig, NetConfig
from asyncvmm.machine.base import AccelName, DriveResource, Resources
from asyncvmm.machine.waiting import in_thread
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.net.user import UserNet


class HostResources:
    """``record`` is what the machine is given. ``aclose`` frees everything, also half-way."""

    def __init__(self) -> None:
        self.record = Resources()
        self._freeing: list[Callable[[], None]] = []
        self._helper: UserNet | None = None

    async def make_ready(self, devices: DeviceConfig, accel: AccelName, timeline: Timeline) -> None:
        """Make overlays and the network.

        Raises ConfigError and HostError, with their kinds: what was asked for cannot be had.
        """
        await self._make_overlays(devices, accel, timeline)
        if devices.net is not None:
            await self._connect(devices.net, timeline)

    async def _make_overlays(self, devices: DeviceConfig, accel: AccelName, timeline: Timeline) -> None:
        if any(drive.overlay for drive in devices.drives):
            with timeline.phase("overlay"):
                drives = await in_thread(lambda: [self._ready(drive, accel) for drive in devices.drives])
        else:
            drives = [DriveResource(drive, drive.path) for drive in devices.drives]
        self.record = attrs.evolve(self.record, drives=tuple(drives))

    def _ready(self, drive: DriveConfig, accel: AccelName) -> DriveResource:
        from asyncvmm.storage.overlay import make_overlay

        if drive.overlay is False:
            return DriveResource(drive, drive.path)
        target = drive.overlay if isinstance(drive.overlay, Path) else None
        overlay = make_overlay(drive.path, target, for_qemu=accel == "qemu")
        self._freeing.append(overlay.remove)
        return DriveResource(drive, overlay.path or drive.path, overlay.format, overlay)

    async def _connect(self, net: NetConfig, timeline: Timeline) -> None:
        from asyncvmm.net.mac import draw_mac, format_mac

        mac = net.mac or format_mac(draw_mac())
        if net.mode == "user":
            from asyncvmm.net.user import start_user_net

            with timeline.phase("network_helper"):
                self._helper = await start_user_net(net, mac)
            fd = self._helper.fd
        else:
            from asyncvmm.net.tap import open_tap

            assert net.tap is not None
            fd = open_tap(net.tap)
            self._freeing.append(lambda: os.close(fd))
        self.record = attrs.evolve(self.record, net_fd=fd, mac=mac)

    async def aclose(self) -> None:
        """Free everything. May be called again."""
        helper, self._helper = self._helper, None
        try:
            if helper is not None:
                await helper.aclose()
        finally:
            while self._freeing:
                self._freeing.pop()()
