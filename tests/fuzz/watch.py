"""Looks over the shoulder of a device's queues, and objects to what no driver has asked for.

It takes the place of the queues' methods, agrees with each chain that comes out (reference.py), and knows at every
moment which bytes of guest RAM the device may write to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.mmio import VirtioMmio
from asyncvmm.devices.virtio.queue import Chain, Queue
from tests.fuzz.memory import ObservedView
from tests.fuzz.reference import Impossible, Offer, Range, Rings

_WRAP = 0xFFFF


class QueueWatch:
    """One queue."""

    def __init__(self, watch: Watch, queue: Queue) -> None:
        self.watch = watch
        self.queue: Any = queue
        self.out: dict[int, Chain] = {}
        self.order: list[Chain] = []
        self._before = (0, 0)
        self._pop, self._push, self._undo_pop, self._reset = queue.pop, queue.push, queue.undo_pop, queue.reset
        self._disable, self._enable = queue.disable_notification, queue.enable_notification
        self._together = getattr(queue, "push_together", None)
        self._fill_plain = getattr(queue, "fill_plain", None)
        names = ["pop", "push", "undo_pop", "reset", "disable_notification", "enable_notification"]
        names += ["push_together", "fill_plain"] * (self._together is not None)
        for name in names:
            setattr(queue, name, getattr(self, name))

    # -- what the device calls -------------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        expected, objection = self._opinion()
        calm = not self.watch.view.strikes
        self.watch.pops += 1
        try:
            chain = self._pop()
        except GuestFault:
            full = self.queue.in_flight >= self.queue.size
            assert full or objection or not calm, "a chain that is as it must be was refused"
            raise
        if chain is not None:
            self._note(chain)
        if calm:
            assert objection is None, f"a chain with {objection} was taken"
            assert _same(chain, expected), "the chain is another than the one that was offered"
        return chain

    def undo_pop(self) -> None:
        chain = self.order.pop()
        del self.out[id(chain)]
        self._undo_pop()

    def push(self, chain: Chain, written: int) -> None:
        if chain.generation == self.queue.generation and self.queue.ready:
            self._give_back(chain, written)
        self._push(chain, written)

    def push_together(self, filled: Sequence[tuple[Chain, int]]) -> None:
        if self.queue.ready and all(chain.generation == self.queue.generation for chain, _ in filled):
            for place, (chain, written) in enumerate(filled):
                self._give_back(chain, written, place)
        assert self._together is not None
        self._together(filled)

    def fill_plain(self, packet: bytearray) -> int:
        """The short way of a frame: buffers are taken and given back at once, as many as are said.

        While the guest writes meanwhile, nobody could say which: the long way is taken then.
        """
        assert self._fill_plain is not None
        if self.watch.view.strikes:
            return 0
        allowed, offers = list(self.watch.allowed), self._next_offers(len(packet))
        place = self.queue._next_used
        for offer in offers:
            slot = place & (self.queue.size - 1)
            self.watch.allowed += [*offer.writable, (self.queue.device_area + 4 + 8 * slot, 8)]
            place += 1
        self.watch.allowed.append((self.queue.device_area + 2, 2))
        count: int = self._fill_plain(packet)
        if not count:
            self.watch.allowed[:] = allowed
        else:
            assert count == len(offers), f"{count} buffers for what {len(offers)} have room for"
            assert all(len(offer.writable) == 1 and not offer.readable for offer in offers)
        self.watch.pops += count
        self.watch.pushes += count
        return count

    def _next_offers(self, size: int) -> list[Offer]:
        """What is offered next, until there is room for so many bytes, or it cannot be."""
        queue, found = self.queue, list[Offer]()
        rings = Rings(queue.size, queue.descriptors, queue.driver_area, queue.indirect)
        while queue.ready and size > 0 and len(found) < queue.size:
            try:
                offer = rings.next_offer(self.watch.view.guest_reads, (queue._next_avail + len(found)) & _WRAP)
            except Impossible:
                break
            if offer is None:
                break
            found.append(offer)
            size -= sum(length for _, length in offer.writable)
        return found

    def reset(self) -> None:
        self.out.clear()
        self.order.clear()
        self._reset()

    def disable_notification(self) -> None:
        self._allow_notification_fields()
        self._disable()

    def enable_notification(self) -> None:
        self._allow_notification_fields()
        self._enable()

    # -- what is thought of it -------------------------------------------------------------------------------------

    def _opinion(self) -> tuple[Offer | None, str | None]:
        queue = self.queue
        if not queue.ready:
            return None, None
        rings = Rings(queue.size, queue.descriptors, queue.driver_area, queue.indirect)
        try:
            return rings.next_offer(self.watch.view.guest_reads, queue._next_avail), None
        except Impossible as why:
            return None, str(why)

    def _note(self, chain: Chain) -> None:
        assert self.watch.running, "a chain was taken for a driver that is not there"
        assert id(chain) not in self.out
        self.out[id(chain)] = chain
        self.order.append(chain)
        assert len(self.out) <= self.queue.size, "more chains are out than the queue has"

    def _give_back(self, chain: Chain, written: int, place: int = 0) -> None:
        assert self.watch.running, "a chain was given back to a driver that is not there"
        assert self.out.pop(id(chain), None) is chain, "a chain was given back twice"
        self.order.remove(chain)
        assert 0 <= written <= chain.writable_size, f"{written} bytes in a buffer of {chain.writable_size}"
        slot = (self.queue._next_used + place) & (self.queue.size - 1)
        self.watch.allowed += _writable(chain)
        self.watch.allowed += [(self.queue.device_area + 2, 2), (self.queue.device_area + 4 + 8 * slot, 8)]
        self.watch.pushes += 1

    def _allow_notification_fields(self) -> None:
        queue = self.queue
        if queue.ready and queue.event_idx:
            self.watch.allowed.append((queue.device_area + 4 + 8 * queue.size, 2))
        elif queue.ready:
            self.watch.allowed.append((queue.device_area, 2))

    def begin(self) -> None:
        """Remember where the used ring stands."""
        self._before = (self.queue.generation, self.queue._next_used)

    def wants_interrupt(self) -> bool:
        """Whether the driver has to hear of what was given back since ``begin`` (2.7.7.1, 2.7.10)."""
        queue, (generation, before) = self.queue, self._before
        moved = (queue._next_used - before) & _WRAP
        if not queue.ready or queue.generation != generation or not moved or self._rings_overwritten():
            return False
        if not queue.event_idx:
            return not self._avail_field(0) & 1
        event = self._avail_field(4 + 2 * queue.size)
        return bool((queue._next_used - event - 1) & _WRAP < moved)

    def _avail_field(self, offset: int) -> int:
        found = self.watch.view.guest_reads(self.queue.driver_area + offset, 2)
        assert found is not None
        return int.from_bytes(found, "little")

    def _rings_overwritten(self) -> bool:
        """Whether the driver offered its own available ring as a buffer: then it has itself to blame."""
        first = self.queue.driver_area
        last = first + 6 + 2 * self.queue.size
        return any(address < last and first < address + size for address, size in self.watch.allowed)

    def is_deaf(self) -> bool:
        """Whether the driver could offer the next chain and would not kick, for it was told of another place."""
        queue = self.queue
        if not queue.ready or not queue.event_idx or queue._avail[1] != queue._next_avail:
            return False
        return bool(queue._armed != queue._next_avail)

    def offered(self) -> list[Range]:
        """What the device may write at any time."""
        return [part for chain in self.out.values() for part in _writable(chain)]


class Watch:
    """All queues of one device. ``allowed``: what it may have written since ``begin``, beside the chains it holds."""

    def __init__(self, view: ObservedView, transport: VirtioMmio) -> None:
        self.view = view
        self.transport = transport
        self.allowed: list[Range] = []
        self.pops = self.pushes = 0
        self.calm = True
        self.queues = [QueueWatch(self, queue) for queue in transport.device.queues]

    @property
    def running(self) -> bool:
        """Whether the driver is there."""
        return self.transport.running

    def begin(self) -> None:
        """Something happens to the device."""
        self.allowed.clear()
        self.allowed += self._offered()
        self.pops = self.pushes = 0
        self.calm = not self.view.strikes
        for queue in self.queues:
            queue.begin()

    def end(self) -> None:
        """It has happened."""
        held = self._offered()
        self.view.strikes.clear()
        self.view.check([*self.allowed, *held], held)

    def wants_interrupt(self) -> bool:
        """Whether the driver must have been interrupted since ``begin``, as far as that can be told."""
        return self.calm and self.running and any(queue.wants_interrupt() for queue in self.queues)

    def _offered(self) -> list[Range]:
        return [part for queue in self.queues for part in queue.offered()]


def _writable(chain: Chain) -> list[Range]:
    return [(address, len(view)) for address, view in zip(chain.writable_at, chain.writable, strict=True)]


def _same(chain: Chain | None, offer: Offer | None) -> bool:
    if chain is None or offer is None:
        return chain is None and offer is None
    readable = [size for _, size in offer.readable]
    found = (chain.head, _writable(chain), [len(view) for view in chain.readable], chain.readable_size)
    return found == (offer.head, offer.writable, readable, sum(readable))
