"""A second opinion on what a split virtqueue offers (virtio 1.2, section 2.7), by addresses and without any views.

It says what the device may read and write; the queue under test must agree with it on every chain.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import attrs

Range = tuple[int, int]
Read = Callable[[int, int], bytes | None]
"""The bytes at an address, None where they are not all RAM."""

NEXT, WRITE, INDIRECT = 1, 2, 4
MOST_TABLE_BYTES = 16 * 1024
MOST_BYTES = 1 << 32


class Impossible(Exception):
    """No driver that keeps to the rules offers this."""


@attrs.define
class Offer:
    """What the device may read, and what it may write."""

    head: int
    readable: list[Range] = attrs.Factory(list)
    writable: list[Range] = attrs.Factory(list)


@attrs.frozen
class Rings:
    """One queue, as its driver set it up."""

    size: int
    descriptors: int
    driver_area: int
    indirect: bool

    def next_offer(self, read: Read, next_avail: int) -> Offer | None:
        """The chain at that place of the available ring, if it is there yet. Raises Impossible."""
        pending = (_number(read, self.driver_area + 2, 2) - next_avail) % 65536
        if pending == 0:
            return None
        if pending > self.size:
            raise Impossible(f"{pending} pending")
        head = _number(read, self.driver_area + 4 + 2 * (next_avail % self.size), 2)
        return self._follow(read, Offer(head))

    def _follow(self, read: Read, offer: Offer) -> Offer:
        index, base, count = offer.head, self.descriptors, self.size
        seen, nested = 0, False
        while index < count:
            address, length, flags, following = struct.unpack("<QIHH", _bytes(read, base + 16 * index, 16))
            if flags & INDIRECT:
                if nested:
                    raise Impossible("a table in a table")
                self._check_table(read, address, length, flags)
                base, count, index, seen, nested = address, length // 16, 0, 0, True
                continue
            seen += 1
            if seen > count:
                raise Impossible("a loop")
            _add(read, offer, address, length, bool(flags & WRITE))
            if not flags & NEXT:
                return offer
            index = following
        raise Impossible(f"descriptor {index} of {count}")

    def _check_table(self, read: Read, address: int, length: int, flags: int) -> None:
        allowed = self.indirect and not flags & NEXT
        if not allowed or length % 16 or not 0 < length <= MOST_TABLE_BYTES or read(address, length) is None:
            raise Impossible("an indirect table")


def _add(read: Read, offer: Offer, address: int, length: int, writable: bool) -> None:
    total = sum(size for _, size in offer.readable + offer.writable) + length
    if not length or total >= MOST_BYTES or read(address, length) is None:
        raise Impossible("a buffer")
    if not writable and offer.writable:
        raise Impossible("readable behind writable")
    (offer.writable if writable else offer.readable).append((address, length))


def _bytes(read: Read, address: int, size: int) -> bytes:
    found = read(address, size)
    assert found is not None, "a ready queue lies in RAM"
    return found


def _number(read: Read, address: int, size: int) -> int:
    return int.from_bytes(_bytes(read, address, size), "little")
