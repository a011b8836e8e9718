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
        disk.start(loop, self._deliver)
        device.backend = disk

    def _deliver(self, requests: Sequence[BlockRequest]) -> None:
        with self.device.session() as alive:
            self.device.complete(requests, alive=alive)
            if self.device.drain():
                self._idle.set()

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
