"""One vCPU's dirty ring, walked: which pages KVM says were written, in the order in which it said so. No I/O.

Source: KVM API, KVM_CAP_DIRTY_LOG_RING. The ring is memory that the kernel shares, an array of struct kvm_dirty_gfn.
The kernel marks the entries of pages that are written *dirty*, one after the other; who has taken note of one marks it
to be *reset*; the kernel does that when it is asked to, and uses the entry anew. None may be skipped.

An entry's flags are read before the rest of it, and written after that was read. That is all that x86-64 wants: its
processors keep loads in order, and stores behind them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from asyncvmm.errors import HostError
from asyncvmm.snapshot.memory_map import PAGE_BYTES

KVM_DIRTY_GFN_BYTES: Final = 16
"""struct kvm_dirty_gfn: flags and slot, 32 bits each, and offset, 64 bits."""
KVM_DIRTY_GFN_F_DIRTY: Final = 1
KVM_DIRTY_GFN_F_RESET: Final = 2

_WORDS: Final = KVM_DIRTY_GFN_BYTES // 4
_QUADS: Final = KVM_DIRTY_GFN_BYTES // 8
_FLAGS, _SLOT, _OFFSET_QUAD = 0, 1, 1

_AT_ONCE: Final = 1024
"""Entries that are looked at in one go: most often there are few, and as many do not take long."""

_DIRTY: Final = re.compile(b"(?:" + re.escape(KVM_DIRTY_GFN_F_DIRTY.to_bytes(4, "little")) + b")*")
_RESET: Final = memoryview(KVM_DIRTY_GFN_F_RESET.to_bytes(4, "little") * _AT_ONCE).cast("I")


class DirtyGfns:
    """The ring in ``ring``, whose size is a power of two. ``sizes``: bytes of the memslots, from slot 0 on, which lie
    back to back in memory. For one thread at a time."""

    def __init__(self, ring: memoryview, sizes: Sequence[int]) -> None:
        self._words, self._quads = ring.cast("I"), ring.cast("Q")
        self._entries = ring.nbytes // KVM_DIRTY_GFN_BYTES
        self._pages = [size // PAGE_BYTES for size in sizes]
        self._first = [0, *accumulate(self._pages)]
        self._next = self._left_out = 0

    @property
    def entries(self) -> int:
        """How many there are."""
        return self._entries

    def harvest(self, found: list[int]) -> int:
        """Add the pages of all dirty entries to ``found``, by number, counted from the start of memory, and mark the
        entries to be reset; returns how many.

        Raises HostError for one that is about no page of memory, which stays the next; those before it were harvested.
        """
        begin = len(found)
        while (room := self._entries - (len(found) - begin)) and (count := self._dirty(room)):
            self._take(count, found)
        return len(found) - begin

    def give_up_some(self) -> None:
        """Mark entries to be reset without a look at them, so that up to a quarter of all are when the kernel resets:
        from where it stands, which is not known of a ring that it overran, to the next one that is left out. Of every
        two calls one leaves out others than where it stands.

        Of a ring that the kernel says is full only: it counts more than a quarter as used.
        """
        quarter = self._entries // 4
        self._left_out = quarter // 2 - self._left_out
        for here in range(0, self._entries, _AT_ONCE):
            end = min(here + _AT_ONCE, self._entries)
            self._words[_WORDS * here + _FLAGS : _WORDS * end : _WORDS] = _RESET[: end - here]
        for here in range(self._left_out, self._entries, quarter):
            self._words[_WORDS * here + _FLAGS] = 0

    def close(self) -> None:
        """Touch the ring no more: it is about to be unmapped."""
        self._words.release()
        self._quads.release()

    def _dirty(self, most: int) -> int:
        """How many entries are dirty from the next one on, as far as is looked at in one go."""
        here = self._next
        end = here + min(most, _AT_ONCE, self._entries - here)
        flags = self._words[_WORDS * here + _FLAGS : _WORDS * end : _WORDS].tobytes()
        match = _DIRTY.match(flags)
        return match.end() // 4 if match else 0

    def _take(self, count: int, found: list[int]) -> None:
        here, end = self._next, self._next + count
        slots = self._words[_WORDS * here + _SLOT : _WORDS * end : _WORDS].tolist()
        offsets = self._quads[_QUADS * here + _OFFSET_QUAD : _QUADS * end : _QUADS].tolist()
        numbers = self._numbers(slots, offsets)
        found += numbers
        good = len(numbers)
        self._words[_WORDS * here + _FLAGS : _WORDS * (here + good) : _WORDS] = _RESET[:good]
        self._next = (here + good) % self._entries
        if good < count:
            found_there = f"slot {slots[good]}, page {offsets[good]:#x}"
            raise HostError("dirty ring", expected="pages of guest memory", found=found_there)

    def _numbers(self, slots: list[int], offsets: list[int]) -> list[int]:
        """The pages, up to the first that is none of memory."""
        pages, first = self._pages, self._first
        if not any(slots) and max(offsets) < pages[0]:
            return offsets
        numbers = []
        for slot, offset in zip(slots, offsets, strict=True):
            if slot >= len(pages) or offset >= pages[slot]:
                break
            numbers.append(first[slot] + offset)
        return numbers
