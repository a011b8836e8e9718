"""A device that always has more to do: its guest refills the rings faster than anybody can empty them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncvmm.devices.virtio.device import VirtioDevice

LOOP_TURNS = 10


class EndlessDevice(VirtioDevice):
    """Counts how often it is called."""

    device_id = 0

    def __init__(self, queues: int) -> None:
        super().__init__((64,) * queues, 0, b"", None)
        self.calls = 0

    def process(self, index: int) -> bool:
        self.calls += 1
        return True

    async def calls_a_turn(self, kick: Callable[[], None]) -> float:
        """How often it is called in a turn of the loop, once its guest has kicked it in each of many."""
        for _ in range(50):
            kick()
            await asyncio.sleep(0)
        before = self.calls
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        return (self.calls - before) / LOOP_TURNS
