"""A network card's receive queue: several buffers for one frame, taken together and given back at one moment.

Facts: virtio 1.2, 5.1.6.3 and 5.1.6.4 (VIRTIO_NET_F_MRG_RXBUF), 2.7.10 (avail_event).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.queue import DESC_F_WRITE, Chain, Queue

DESCRIPTORS_A_FRAME: Final = 2048
"""A frame whose buffers have more is given up: it bounds the time one frame can take."""

_WRAP: Final = 0xFFFF
_DESCRIPTOR: Final = struct.Struct("<QIHH")
_NUM_BUFFERS: Final = slice(10, 12)
"""Where a packet's virtio header says how many buffers it lies in."""


class ReceiveQueue(Queue):
    """See Queue. Buffers that are too few for a frame stay where they are, and the driver kicks for the next one."""

    def _forget(self) -> None:
        super()._forget()
        self._looked_at = 0

    def take(self, size: int, *, merge: bool) -> list[Chain] | None:
        """Buffers of ``size`` bytes together, one unless ``merge``; empty if the driver's will never do.

        None if there are too few yet: then the driver has been asked to kick for more. Raises GuestFault.
        """
        chains: list[Chain] = []
        most = self.size if merge else 1
        self._looked_at = 0
        while True:
            before = len(chains)
            room, descriptors = self._pop_more(chains, size, most)
            if room >= size:
                return chains
            if len(chains) >= most or descriptors > DESCRIPTORS_A_FRAME:
                self._put_back(chains)
                return []
            if before and len(chains) == before:
                break
            self.enable_notification()  # and look again, in case the driver did not see it in time
            if not self.available():
                break
        self._looked_at = len(chains)
        self._put_back(chains)
        return None

    # -- the short way -----------------------------------------------------------------------------------------------

    def fill_plain(self, packet: bytearray) -> int:
        """Put a packet, its header in front, into buffers of one descriptor each, and give those back together: what
        drivers make for packets of many buffers. Returns how many; 0 if the next ones are too few, or anything else,
        which is ``take``'s affair: then nothing has happened. Raises GuestFault.
        """
        memory = self._memory
        if memory is None or not self.available():
            return 0
        heads: list[int] = []
        spans: list[tuple[int, int]] = []
        if not self._find_plain(len(packet), heads, spans):
            return 0
        count = len(heads)
        packet[_NUM_BUFFERS] = count.to_bytes(2, "little")
        self._write_plain(memory, memoryview(packet), heads, spans)
        self._next_avail = (self._next_avail + count) & _WRAP
        self._looked_at = 0
        self.walked += count
        self.is_touched = True
        return count

    def _find_plain(self, size: int, heads: list[int], spans: list[tuple[int, int]]) -> bool:
        """Heads and places of buffers for so many bytes; False if they will not do."""
        avail, table, mask = self._avail, self._table, self.size - 1
        place, left = self._next_avail, min((self._seen - self._next_avail) & _WRAP, self.size - self.in_flight)
        while size > 0:
            head = avail[2 + (place & mask)]
            if len(heads) >= left or head > mask:
                return False
            address, length, flags, _ = _DESCRIPTOR.unpack_from(table, 16 * head)
            if flags != DESC_F_WRITE or not length:
                return False
            heads.append(head)
            spans.append((address, length))
            size -= length
            place += 1
        return True

    def _write_plain(
        self, memory: GuestView, packet: memoryview, heads: list[int], spans: list[tuple[int, int]]
    ) -> None:
        views = [memory.view(address, length) for address, length in spans]
        index, mask, used, at = self._next_used, self.size - 1, self._used, 0
        for head, view in zip(heads, views, strict=True):
            piece = packet[at : at + len(view)]
            written = len(piece)
            view[:written] = piece
            slot = 2 * (index & mask)
            used[1 + slot] = head
            used[2 + slot] = written
            index += 1
            at += written
        if memory.dirty.is_on:
            self._mark_plain(memory, len(packet), spans)
        self._next_used = index & _WRAP
        self._used_flags[1] = self._next_used

    def _mark_plain(self, memory: GuestView, size: int, spans: list[tuple[int, int]]) -> None:
        memory.mark(self.device_area, 4)
        for number, (address, length) in enumerate(spans):
            memory.mark(self.device_area + 4 + 8 * (self._next_used + number & self.size - 1), 8)
            memory.mark(address, min(length, size))
            size -= length

    # -- any way -----------------------------------------------------------------------------------------------------

    def _pop_more(self, chains: list[Chain], size: int, most: int) -> tuple[int, int]:
        """Pop until there is room; returns the bytes and the descriptors of all of them."""
        room = sum(chain.writable_size for chain in chains)
        descriptors = sum(len(chain.writable) + len(chain.readable) for chain in chains)
        while room < size and len(chains) < most and descriptors <= DESCRIPTORS_A_FRAME:
            chain = self.pop()
            if chain is None:
                break
            chains.append(chain)
            room += chain.writable_size
            descriptors += len(chain.writable) + len(chain.readable)
        return room, descriptors

    def _put_back(self, chains: Sequence[Chain]) -> None:
        for _ in chains:
            self.undo_pop()

    def enable_notification(self) -> None:
        """See Queue: the next chain is the one behind those that were too few."""
        self._next_avail = (self._next_avail + self._looked_at) & _WRAP
        try:
            super().enable_notification()
        finally:
            self._next_avail = (self._next_avail - self._looked_at) & _WRAP

    def push_together(self, filled: Sequence[tuple[Chain, int]]) -> None:
        """Give chains back, with the bytes written to each, by one move of the used index.

        A driver that sees the first of a frame's buffers looks for the others at once, and gives the frame up if they
        are not there yet.
        """
        if not self.ready or self._memory is None or any(not self.is_current(chain) for chain, _ in filled):
            return
        index = self._next_used
        for chain, written in filled:
            slot = index & (self.size - 1)
            self._used[1 + 2 * slot] = chain.head
            self._used[2 + 2 * slot] = written
            if self._memory.dirty.is_on:
                self._mark(self._memory, chain, slot, written)
            index = (index + 1) & _WRAP
        self._next_used = index
        self._used_flags[1] = index
        self.in_flight -= len(filled)
        self.is_touched = True
