"""A network card's receive queue: several buffers for one frame, taken together and given back at one moment.

Facts: virtio 1.2, 5.1.6.3 and 5.1.6.4 (VIRTIO_NET_F_MRG_RXBUF), 2.7.10 (avail_event).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from asyncvmm.devices.virtio.queue import Chain, Queue

DESCRIPTORS_A_FRAME: Final = 2048
"""A frame whose buffers have more is given up: it bounds the time one frame can take."""

_WRAP: Final = 0xFFFF


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
            self._mark(self._memory, chain, slot, written)
            index = (index + 1) & _WRAP
        self._next_used = index
        self._used_flags[1] = index
        self.in_flight -= len(filled)
