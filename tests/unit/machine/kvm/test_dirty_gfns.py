"""A dirty ring is walked entry by entry, as the kernel fills it: nothing is lost, doubled or made up."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.errors import HostError
from asyncvmm.machine.kvm.dirty_gfns import DirtyGfns
from asyncvmm.snapshot.memory_map import PAGE_BYTES

ENTRY = struct.Struct("<IIQ")
EMPTY, DIRTY, RESET = 0, 1, 2
PAGES = (40, 25)
"""Of two memslots."""
SIZES = [count * PAGE_BYTES for count in PAGES]

Gfn = tuple[int, int]
gfns = st.one_of(*(st.tuples(st.just(slot), st.integers(0, count - 1)) for slot, count in enumerate(PAGES)))
odd = st.one_of(
    st.tuples(st.integers(2, 2**32 - 1), st.integers(0, 24)),
    *(st.tuples(st.just(slot), st.integers(count, 2**64 - 1)) for slot, count in enumerate(PAGES)),
)


def number(gfn: Gfn) -> int:
    slot, offset = gfn
    return sum(PAGES[:slot]) + offset


class Kernel:
    """The kernel's half of a ring (virt/kvm/dirty_ring.c does the same): it looks at no room."""

    def __init__(self, entries: int) -> None:
        self.memory = bytearray(entries * ENTRY.size)
        self.entries = entries
        self.dirty_index = self.reset_index = 0

    @property
    def used(self) -> int:
        return self.dirty_index - self.reset_index

    def push(self, gfn: Gfn) -> None:
        ENTRY.pack_into(self.memory, self.dirty_index % self.entries * ENTRY.size, DIRTY, *gfn)
        self.dirty_index += 1

    def reset(self) -> list[Gfn]:
        found = list[Gfn]()
        while True:
            at = self.reset_index % self.entries * ENTRY.size
            flags, slot, offset = ENTRY.unpack_from(self.memory, at)
            if not flags & RESET:
                return found
            ENTRY.pack_into(self.memory, at, EMPTY, slot, offset)
            self.reset_index += 1
            found.append((slot, offset))


def walker(kernel: Kernel) -> DirtyGfns:
    return DirtyGfns(memoryview(kernel.memory), SIZES)


@pytest.mark.parametrize("entries", [1, 8, 4096])
def test_an_empty_ring_names_nothing(entries: int) -> None:
    found: list[int] = []
    assert walker(Kernel(entries)).harvest(found) == 0
    assert found == []


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 4095, 4096])
def test_a_ring_may_be_full_and_is_walked_once(count: int) -> None:
    kernel, found = Kernel(4096), [7]
    ring = walker(kernel)
    for index in range(count):
        kernel.push((0, index % 40))
    assert ring.harvest(found) == count
    assert found == [7, *(index % 40 for index in range(count))]
    assert ring.harvest(found) == 0
    assert len(kernel.reset()) == count


def test_entries_that_are_dirty_but_behind_one_that_is_not_yet_are_left() -> None:
    kernel, found = Kernel(8), list[int]()
    ring = walker(kernel)
    for gfn in [(0, 1), (0, 2), (0, 3)]:
        kernel.push(gfn)
    ENTRY.pack_into(kernel.memory, ENTRY.size, EMPTY, 0, 2)  # its flags are not there yet
    assert ring.harvest(found) == 1
    ENTRY.pack_into(kernel.memory, ENTRY.size, DIRTY, 0, 2)
    assert ring.harvest(found) == 2
    assert found == [1, 2, 3]


@given(st.lists(gfns, max_size=7), odd, st.lists(gfns, max_size=3))
def test_an_entry_about_no_page_of_memory_is_refused_each_time_and_what_was_before_it_is_known(
    good: list[Gfn], wrong: Gfn, behind: list[Gfn]
) -> None:
    kernel, found = Kernel(16), list[int]()
    ring = walker(kernel)
    for gfn in [*good, wrong, *behind]:
        kernel.push(gfn)
    for _ in range(2):
        with pytest.raises(HostError, match=f"slot {wrong[0]}, page {wrong[1]:#x}") as caught:
            ring.harvest(found)
        assert caught.value.expected == "pages of guest memory"
    assert found == [number(gfn) for gfn in good]
    assert kernel.reset() == good


@given(st.integers(0, 63), st.integers(0, 500))
def test_a_ring_that_was_overrun_is_found_full_and_has_room_again_in_the_end(before: int, beyond: int) -> None:
    kernel, soft_limit = Kernel(64), 48
    ring = walker(kernel)
    for _ in range(before):
        kernel.push((0, 1))
    ring.harvest([])
    kernel.reset()
    for _ in range(kernel.entries + beyond):
        kernel.push((0, 2))
    assert ring.harvest([]) == kernel.entries
    kernel.reset()
    calls = 0
    while kernel.used >= soft_limit:
        ring.give_up_some()
        kernel.reset()
        calls += 1
        assert kernel.used >= 0
    assert calls <= beyond // 8 + 2


def test_a_ring_that_was_closed_is_not_touched() -> None:
    ring = walker(Kernel(8))
    ring.close()
    with pytest.raises(ValueError, match="released"):
        ring.harvest([])


class Walk(RuleBasedStateMachine):
    """The kernel writes and resets, we harvest, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel(8)
        self.ring = walker(self.kernel)
        self.pushed: list[Gfn] = []
        self.reset: list[Gfn] = []
        self.found: list[int] = []

    @precondition(lambda self: self.kernel.used < self.kernel.entries)
    @rule(gfn=gfns)
    def write(self, gfn: Gfn) -> None:
        self.kernel.push(gfn)
        self.pushed.append(gfn)

    @rule()
    def harvest(self) -> None:
        before = len(self.found)
        assert self.ring.harvest(self.found) == len(self.pushed) - before
        assert len(self.found) == len(self.pushed)

    @rule()
    def reset_harvested(self) -> None:
        self.reset += self.kernel.reset()
        assert len(self.reset) == len(self.found)

    @invariant()
    def nothing_is_lost_or_made_up(self) -> None:
        assert self.found == [number(gfn) for gfn in self.pushed[: len(self.found)]]
        assert self.reset == self.pushed[: len(self.reset)]


TestWalk = Walk.TestCase
