"""Joins a virtio block device to its disk on the loop."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Sequence

from asyncvmm.devices.virtio.blk import VirtioBlk
from asyncvmm.devices.virtio.block_io import BlockRequest
from asyncvmm.storage.disk import CLOSE_TIMEOUT_S, Disk


class BlkShell:
    """Made on the loop, after the device has its transport and before the driver comes."""

    def __init__(self, device: VirtioBlk, disk: Disk, loop: AbstractEventLoop) -> None:
        self.device = device
        self.disk = disk
        self._idle = asyncio.Event()
        self._held = False
        self._kept: list[BlockRequest] = []
        disk.start(loop, self._deliver)
        device.backend = disk

    def _deliver(self, requests: Sequence[BlockRequest]) -> None:
        if self._held:
            self._kept += requests
            return
        with self.device.session() as alive:
            self.device.complete(requests, alive=alive)
            if self.device.drain():
                self._idle.set()

    def hold(self) -> None:
        """From now on what the disk gives back waits here: the guest's memory is not to be touched."""
        self._held = True

    def release(self) -> None:
        """Give the device what came meanwhile. May be called again."""
        self._held = False
        if self._kept:
            kept, self._kept = self._kept, []
            self._deliver(kept)

    async def drained(self) -> None:
        """Return when nothing is under way. The vCPUs must stand still, and the queue be left alone meanwhile."""
        while not self._is_idle():
            self._idle.clear()
            await self._idle.wait()

    def _is_idle(self) -> bool:
        with self.device.session():
            return self.device.drain()

    def close(self) -> None:
        """Give up, without waiting: what has not begun does not happen any more."""
        self.disk.close()

    async def aclose(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Finish what is under way and close the disk. False: it hangs, and guest memory must stay mapped."""
        return await self.disk.aclose(timeout_s)
