"""The driver's half of one split virtqueue (virtio 1.2, section 2.7.13), over plain memory.

It has two faces. ``offer`` and ``take_used`` are a driver that keeps to the specification. The ``set_`` methods write
any value to any place, as a hostile guest does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs

from asyncvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

_WRAP = 0xFFFF


@attrs.frozen
class Used:
    """A chain the device gave back: its head, how many bytes it says it wrote, and those bytes."""

    head: int
    written: int
    data: bytes


@attrs.define
class _Offered:
    descriptors: list[int]
    writable: list[tuple[int, int]]


class DriverQueue:
    """Rings of ``size`` descriptors at ``base`` of ``memory``, with room for buffers behind them up to ``end``."""

    def __init__(self, memory: bytearray, base: int, end: int, size: int, *, event_idx: bool = False) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.descriptors = base
        self.driver_area = base + 16 * size
        self.device_area = (self.driver_area + 6 + 2 * size + 3) & ~3
        self._buffers = (self.device_area + 6 + 8 * size + 15) & ~15
        self._end = end
        self._next = self._buffers
        self._free = list(range(size))
        self._offered: dict[int, _Offered] = {}
        self.avail_index = 0
        self.seen_used = 0

    # -- a driver that keeps to the rules --------------------------------------------------------------------------

    def offer(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> int:
        """Make a chain available; returns its head. Raises IndexError if no descriptor is free."""
        parts = [(self._place(data), len(data), 0) for data in readable]
        parts += [(self._place(bytes(size)), size, DESC_F_WRITE) for size in writable]
        used = self._write_indirect(parts) if indirect else self._write_direct(parts)
        spans = [(address, length) for address, length, flags in parts if flags]
        self._offered[used[0]] = _Offered(used, spans)
        self.put_available(used[0])
        return used[0]

    def put_available(self, head: int) -> None:
        """Append a head to the available ring and move its index."""
        self.set_avail(self.avail_index % self.size, head)
        self.avail_index = (self.avail_index + 1) & _WRAP
        self.set_avail_index(self.avail_index)

    def take_used(self) -> list[Used]:
        """What the device has given back since this was last asked. With event indices, asks for the next interrupt."""
        found = []
        while self.seen_used != self.used_index:
            offset = self.device_area + 4 + 8 * (self.seen_used % self.size)
            head, written = struct.unpack_from("<II", self.memory, offset)
            self.seen_used = (self.seen_used + 1) & _WRAP
            found.append(self._retire(head, written))
        if self.event_idx:
            self.set_used_event(self.seen_used)
        return found

    @property
    def used_index(self) -> int:
        """The device's index of the used ring."""
        return int.from_bytes(self.memory[self.device_area + 2 : self.device_area + 4], "little")

    @property
    def avail_event(self) -> int:
        """Where the device wants to be kicked, with event indices."""
        offset = self.device_area + 4 + 8 * self.size
        return int.from_bytes(self.memory[offset : offset + 2], "little")

    @property
    def used_flags(self) -> int:
        """The device's flags: whether it wants kicks, without event indices."""
        return int.from_bytes(self.memory[self.device_area : self.device_area + 2], "little")

    def _retire(self, head: int, written: int) -> Used:
        offered = self._offered.pop(head, None)
        if offered is None:
            return Used(head, written, b"")
        self._free += offered.descriptors
        data = b"".join(bytes(self.memory[at : at + size]) for at, size in offered.writable)
        if not self._offered:
            self._next = self._buffers
        return Used(head, written, data[:written])

    def _place(self, data: bytes) -> int:
        address = self._next
        if address + len(data) > self._end:
            raise IndexError(f"no room for a buffer of {len(data)} bytes")
        self.memory[address : address + len(data)] = data
        self._next = address + len(data)
        return address

    def _write_direct(self, parts: Sequence[tuple[int, int, int]]) -> list[int]:
        used = [self._free.pop(0) for _ in parts]
        for position, (address, length, flags) in enumerate(parts):
            last = position == len(parts) - 1
            following = 0 if last else used[position + 1]
            self.set_descriptor(used[position], address, length, flags | (0 if last else DESC_F_NEXT), following)
        return used

    def _write_indirect(self, parts: Sequence[tuple[int, int, int]]) -> list[int]:
        table = b"".join(
            struct.pack("<QIHH", address, length, flags | (DESC_F_NEXT if i < len(parts) - 1 else 0), i + 1)
            for i, (address, length, flags) in enumerate(parts)
        )
        self._next = (self._next + 15) & ~15
        index = self._free.pop(0)
        self.set_descriptor(index, self._place(table), len(table), DESC_F_INDIRECT, 0)
        return [index]

    # -- any value anywhere ----------------------------------------------------------------------------------------

    def set_descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """Write one entry of the descriptor table."""
        struct.pack_into("<QIHH", self.memory, self.descriptors + 16 * index, address, length, flags, following)

    def set_avail(self, slot: int, head: int) -> None:
        """Write one slot of the available ring."""
        struct.pack_into("<H", self.memory, self.driver_area + 4 + 2 * slot, head)

    def set_avail_index(self, index: int) -> None:
        """Write the available ring's index."""
        struct.pack_into("<H", self.memory, self.driver_area + 2, index & _WRAP)

    def set_avail_flags(self, flags: int) -> None:
        """Write the available ring's flags: 1 wants no interrupt."""
        struct.pack_into("<H", self.memory, self.driver_area, flags)

    def set_used_event(self, index: int) -> None:
        """Write where the driver wants to be interrupted, with event indices."""
        struct.pack_into("<H", self.memory, self.driver_area + 4 + 2 * self.size, index)
