"""A virtio balloon with a driver before it and a host behind it that takes note."""

from __future__ import annotations

import struct
from typing import Any

from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.virtio.balloon.device import VirtioBalloon
from asyncvmm.devices.virtio.balloon.pages import PAGE_BYTES, Range
from asyncvmm.metrics.counters import kinds
from asyncvmm.metrics.groups import BalloonMetrics
from asyncvmm.testing.driver import Driver

RAM = 5 << 18
ALL = BalloonConfig(free_page_hinting=True)


class Host:
    """Remembers what was given back, and zeroes it. ``refuse``: pages that cannot be taken."""

    def __init__(self) -> None:
        self.memory = bytearray()
        self.released: list[Range] = []
        self.refuse: set[int] = set()

    def release(self, ranges: list[Range]) -> int:
        self.released += ranges
        taken = [(address, size) for address, size in ranges if address // PAGE_BYTES not in self.refuse]
        for address, size in taken:
            if address + size <= len(self.memory):
                self.memory[address : address + size] = bytes(size)
        return sum(size for _, size in taken)


def balloon(config: BalloonConfig = ALL, ram: int = RAM) -> tuple[VirtioBalloon, Host]:
    host = Host()
    return VirtioBalloon(config, [(0, ram)], host, BalloonMetrics()), host


def driven(config: BalloonConfig = ALL) -> tuple[Driver, VirtioBalloon, Host]:
    device, host = balloon(config)
    return Driver(device, memory_size=RAM), device, host


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def statistics(**values: int) -> bytes:
    tags = {"free_memory": 4, "total_memory": 5}
    return b"".join(struct.pack("<HQ", tags[name], value) for name, value in values.items())


def counted(device: VirtioBalloon) -> dict[str, Any]:
    """The counters that are not 0."""
    return {name: value for name in kinds(BalloonMetrics) if (value := getattr(device.metrics, name))}
