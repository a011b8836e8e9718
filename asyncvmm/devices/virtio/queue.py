"""The device's half of a split virtqueue (virtio 1.2, section 2.7), with indirect descriptors and event indices.

The guest owns the rings and may write anything to them at any moment: every value is read once, checked, then used.
Buffers are handed out as views of guest RAM, so what they contain may change under a reader's eyes, too.

Each activation has a *generation*. A chain that was popped before the queue was reset belongs to an older one: it is
neither written to nor given back, for the guest may have made something else of that memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from asyncvmm.devices.checks import boolean, integer
from asyncvmm.devices.virtio.memory import GuestFault, GuestView

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4

AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

MOST_DESCRIPTORS: Final = 1024
"""Descriptors one chain may have: what bounds the time it takes to look at it."""

DESCRIPTORS_A_TURN: Final = 512
"""Once so many were looked at, others have their turn: a few milliseconds, with the longest of chains."""

MOST_BYTES: Final = 1 << 32
"""Bytes one chain may have (section 2.7.4.2: less than that)."""

_DESCRIPTOR = struct.Struct("<QIHH")
_WRAP: Final = 0xFFFF
_MOST_SIZE: Final = (1 << 32) - 1
"""Of a queue that is not ready: whatever the driver wrote to the register."""


class Chain:
    """One buffer of the guest's: what the device may read, then what it may write, as views of guest RAM."""

    __slots__ = ("generation", "head", "readable", "readable_size", "writable", "writable_at", "writable_size")

    def __init__(self, head: int, generation: int) -> None:
        self.head = head
        self.generation = generation
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.writable_at: list[int] = []
        self.readable_size = 0
        self.writable_size = 0

    def read(self, size: int | None = None, offset: int = 0) -> bytes:
        """Bytes of the readable part from ``offset`` on; fewer if there are not as many."""
        left = self.readable_size - offset if size is None else size
        pieces = []
        for view in self.readable:
            if offset >= len(view):
                offset -= len(view)
                continue
            piece = view[offset : offset + left]
            pieces.append(piece)
            left -= len(piece)
            offset = 0
            if left <= 0:
                break
        return b"".join(pieces)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Write to the writable part from ``offset`` on; returns how many bytes fitted.

        Only while the queue says that the chain is current.
        """
        done, size = 0, len(data)
        for view in self.writable:
            if offset >= len(view):
                offset -= len(view)
                continue
            room = min(len(view) - offset, size - done)
            view[offset : offset + room] = data[done : done + room]
            done += room
            offset = 0
            if done == size:
                break
        return done


def _impossible(left: int, count: int, length: int) -> GuestFault:
    """What is wrong with a descriptor that cannot be."""
    if left < 0:
        return GuestFault(f"a descriptor loop, or a chain longer than {count}")
    return GuestFault(f"a chain of {MOST_BYTES} bytes or more" if length else "a buffer of no bytes")


class Queue:
    """One virtqueue. The transport sets ``size`` and the three addresses, then ``enable`` checks them.

    max_size: the most descriptors the guest may ask for. is_patient: the guest does not wait for what is pushed, so it
    may learn of it with the next interrupt there is; the device sets it, and sees to it that it does not take long.
    is_touched: a chain was popped or pushed since the transport, which sets it back, last saw to notifications.
    The methods may raise GuestFault where they say so, and nothing else.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.is_patient = False
        self.is_touched = False
        self.generation = 0
        self.walked = 0
        self._forget()

    def _forget(self) -> None:
        self.size = 0
        self.descriptors = self.driver_area = self.device_area = 0
        self.ready = False
        self.event_idx = self.indirect = self._hurries = False
        self.in_flight = 0
        self._next_avail = self._next_used = self._signalled = self._armed = self._seen = 0
        self._memory: GuestView | None = None
        self._table = self._avail = self._used = self._used_flags = memoryview(b"")

    def reset(self) -> None:
        """As made; every chain that is out belongs to the past."""
        self.generation += 1
        self._forget()

    def enable(self, memory: GuestView, *, event_idx: bool, indirect: bool) -> None:
        """Take size and addresses as set. Raises GuestFault for what the specification does not allow, or no RAM."""
        size = self.size
        if not 0 < size <= self.max_size or size & (size - 1):
            raise GuestFault(f"queue size {size}, not a power of two up to {self.max_size}")
        for name, address, alignment in (
            ("descriptor table", self.descriptors, 16),
            ("driver area", self.driver_area, 2),
            ("device area", self.device_area, 4),
        ):
            if address % alignment:
                raise GuestFault(f"{name} at {address:#x}, not aligned to {alignment}")
        self._table = memory.view(self.descriptors, 16 * size)
        self._avail = memory.view(self.driver_area, 6 + 2 * size).cast("H")
        used = memory.view(self.device_area, 6 + 8 * size)
        self._used_flags = used.cast("H")
        self._used = used[: 4 + 8 * size].cast("I")
        self._memory = memory
        self.event_idx, self.indirect = event_idx, indirect
        self.ready = self.is_touched = True

    def is_current(self, chain: Chain) -> bool:
        """Whether the guest still waits for that chain."""
        return chain.generation == self.generation

    def available(self) -> int:
        """Chains that are there to be popped. Raises GuestFault if the guest's index jumped."""
        if not self.ready:
            return 0
        self._seen = self._avail[1]
        pending = (self._seen - self._next_avail) & _WRAP
        if pending > self.size:
            raise self._too_many()
        return pending

    def _too_many(self) -> GuestFault:
        pending = (self._seen - self._next_avail) & _WRAP
        if pending > self.size:
            return GuestFault(f"available index ahead by {pending} in a queue of {self.size}")
        return GuestFault(f"more chains than the {self.size} of the queue")

    def pop(self) -> Chain | None:
        """The next available chain; None if there is none. Raises GuestFault for one that cannot be."""
        if not self.ready:
            return None
        size, place, seen = self.size, self._next_avail, self._avail[1]
        self._seen = seen
        if seen == place:
            return None
        if (seen - place) & _WRAP > size or self.in_flight >= size:
            raise self._too_many()
        chain = self._walk(self._avail[2 + (place & (size - 1))])
        self._next_avail = (place + 1) & _WRAP
        self.in_flight += 1
        self.is_touched = True
        return chain

    def turn(self, most: int) -> Iterator[None]:
        """The steps of a loop that pops: at most ``most``, fewer once DESCRIPTORS_A_TURN were looked at meanwhile."""
        end = self.walked + DESCRIPTORS_A_TURN
        for _ in range(most):
            if self.walked >= end:
                break
            yield

    def undo_pop(self) -> None:
        """Take back the newest pop, of which nothing was used: its chain is the next again."""
        self._next_avail = (self._next_avail - 1) & _WRAP
        self.in_flight -= 1
        self.is_touched = True

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, ``written`` bytes of its writable part used. Does nothing for one of the past."""
        if chain.generation != self.generation or not self.ready or self._memory is None:
            return
        used, slot = self._used, self._next_used & (self.size - 1)
        used[1 + 2 * slot] = chain.head
        used[2 + 2 * slot] = written
        self._used_flags[1] = self._next_used = (self._next_used + 1) & _WRAP
        self.in_flight -= 1
        self.is_touched = True
        if self._memory.dirty.is_on:
            self._mark(self._memory, chain, slot, written)

    def _mark(self, memory: GuestView, chain: Chain, slot: int, written: int) -> None:
        memory.mark(self.device_area, 4)
        memory.mark(self.device_area + 4 + 8 * slot, 8)
        for address, view in zip(chain.writable_at, chain.writable, strict=True):
            if written <= 0:
                break
            memory.mark(address, min(len(view), written))
            written -= len(view)

    # -- notifications, for the transport --------------------------------------------------------------------------

    def take_interrupt(self) -> bool:
        """Whether the guest wants to be interrupted for what was pushed since this was last asked (2.7.7, 2.7.10).

        A patient queue says no until ``hurry``, or until there is more than an eighth of it.
        """
        before = self._signalled
        if before == self._next_used or not self.ready or self._memory is None:
            return False
        if self.is_patient and not self._hurries and (self._next_used - before) & _WRAP <= self.size >> 3:
            return False
        self._signalled, self._hurries = self._next_used, False
        self._memory.fence()
        if not self.event_idx:
            return not self._avail[0] & AVAIL_F_NO_INTERRUPT
        event = self._avail[2 + self.size]
        return (self._next_used - event - 1) & _WRAP < (self._next_used - before) & _WRAP

    @property
    def is_untold(self) -> bool:
        """Whether something was pushed that no interrupt was thought of for."""
        return self.ready and self._signalled != self._next_used

    def hurry(self) -> None:
        """Be patient no more about what was pushed so far."""
        self._hurries = self.is_touched = self.is_untold

    def disable_notification(self) -> None:
        """Ask the guest not to kick for a while; with event indices it does not anyway."""
        if self.ready and not self.event_idx and self._memory is not None:
            self._used_flags[0] = USED_F_NO_NOTIFY
            self._memory.mark(self.device_area, 4)

    def enable_notification(self) -> None:
        """Ask the guest to kick for the next chain. Look at ``has_unseen`` afterwards: one may have come before."""
        if not self.ready or self._memory is None:
            return
        self._armed = self._next_avail
        if self.event_idx:
            self._used_flags[2 + 4 * self.size] = self._next_avail
            self._memory.mark(self.device_area + 4 + 8 * self.size, 2)
        else:
            self._used_flags[0] = 0
            self._memory.mark(self.device_area, 4)
        self._memory.fence()

    def rearm(self) -> bool:
        """With event indices, ask for a kick for the next chain if one was popped since that was last asked: the
        driver would take the old place for passed, and kick no more. True: a chain came in between, without a kick.
        """
        if not self.ready or not self.event_idx or self._armed == self._next_avail:
            return False
        self.enable_notification()
        return self.has_unseen

    @property
    def has_unseen(self) -> bool:
        """Whether chains came after the last ``look``, ``pop`` or ``available``: a device may have stopped for want of
        them. How many are left says nothing: it leaves some on purpose.
        """
        return self.ready and self._avail[1] != self._seen

    def look(self) -> None:
        """What has come so far is seen, whether the device cares for it or not."""
        if self.ready:
            self._seen = self._avail[1]

    # -- walking ---------------------------------------------------------------------------------------------------

    def _walk(self, head: int) -> Chain:
        """Follow a chain from its head. Raises GuestFault. All in one place: it is the bulk of what a request costs."""
        assert self._memory is not None
        view_of, chain = self._memory.view, Chain(head, self.generation)
        start, end, ram = self._memory.first  # where nearly all is, without a call for each
        room = end - start
        readable, writable = chain.readable, chain.writable
        table, count, index, left, size = self._table, self.size, head, self.size, 0
        while True:
            if index >= count:
                raise GuestFault(f"descriptor {index} of {count}")
            address, length, flags, index = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & DESC_F_INDIRECT:
                if table is not self._table:
                    raise GuestFault("an indirect table in an indirect table")
                table, index = self._indirect_table(self._memory, address, length, flags), 0
                count = left = len(table) // 16
                continue
            left -= 1
            size += length
            if left < 0 or not length or size >= MOST_BYTES:
                raise _impossible(left, count, length)
            place = address - start
            view = ram[place : place + length] if 0 <= place <= room - length else view_of(address, length)
            if flags & DESC_F_WRITE:
                writable.append(view)
                chain.writable_at.append(address)
                chain.writable_size += length
            elif writable:
                raise GuestFault("a readable buffer behind a writable one")
            else:
                readable.append(view)
            if not flags & DESC_F_NEXT:
                chain.readable_size = size - chain.writable_size
                self.walked += len(readable) + len(writable)
                return chain

    def _indirect_table(self, memory: GuestView, address: int, length: int, flags: int) -> memoryview:
        if not self.indirect:
            raise GuestFault("an indirect descriptor that was not negotiated")
        if flags & DESC_F_NEXT:
            raise GuestFault("an indirect descriptor with a next one")
        if not length or length % 16 or length > 16 * MOST_DESCRIPTORS:
            raise GuestFault(f"an indirect table of {length} bytes")
        return memory.view(address, length)

    # -- snapshots -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps. Chains that are out are not in it: finish them first."""
        return {
            "size": self.size,
            "descriptors": self.descriptors,
            "driver_area": self.driver_area,
            "device_area": self.device_area,
            "ready": self.ready,
            "next_avail": (self._next_avail - self.in_flight) & _WRAP,
            "next_used": self._next_used,
            "signalled": self._signalled,
        }

    def restore(self, state: Mapping[str, Any], memory: GuestView, *, event_idx: bool, indirect: bool) -> None:
        """Become what ``state`` says. Raises ConfigError for what no queue can be, GuestFault as ``enable``."""
        self.reset()
        self.size = integer(state, "size", _MOST_SIZE)
        self.descriptors = integer(state, "descriptors", (1 << 64) - 1)
        self.driver_area = integer(state, "driver_area", (1 << 64) - 1)
        self.device_area = integer(state, "device_area", (1 << 64) - 1)
        if boolean(state, "ready"):
            self.enable(memory, event_idx=event_idx, indirect=indirect)
        self._next_avail = integer(state, "next_avail", _WRAP)
        self._next_used = integer(state, "next_used", _WRAP)
        self._signalled = integer(state, "signalled", _WRAP)
