"""Rings and chains that cannot be: the device asks for a reset, and touches nothing outside of what it was given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestFault, GuestView
from asyncvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, MOST_DESCRIPTORS
from asyncvmm.testing import Driver, DriverQueue

RAM = 1 << 16
BUFFER = 0x8000


class Sink(VirtioDevice):
    """Gives every chain back, having written to the whole of its writable part."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__((8,), 0, b"", object())
        self.seen = 0

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        for _ in range(4):
            chain = queue.pop()
            if chain is None:
                return False
            self.seen += 1
            chain.read()
            queue.push(chain, chain.write(b"\xaa" * chain.writable_size))
        return True


def driver(**options: bool) -> Driver:
    return Driver(Sink(), memory_size=RAM, queue_size=8, **options)


def one(address: int, length: int, flags: int, following: int = 0) -> Callable[[DriverQueue], None]:
    def write(queue: DriverQueue) -> None:
        queue.set_descriptor(0, address, length, flags, following)
        queue.put_available(0)

    return write


def head(index: int) -> Callable[[DriverQueue], None]:
    return lambda queue: queue.put_available(index)


def loop(queue: DriverQueue) -> None:
    queue.set_descriptor(0, BUFFER, 1, DESC_F_NEXT, 1)
    queue.set_descriptor(1, BUFFER, 1, DESC_F_NEXT, 0)
    queue.put_available(0)


def readable_behind_writable(queue: DriverQueue) -> None:
    queue.set_descriptor(0, BUFFER, 8, DESC_F_WRITE | DESC_F_NEXT, 1)
    queue.set_descriptor(1, BUFFER, 8, 0, 0)
    queue.put_available(0)


def table_in_table(queue: DriverQueue) -> None:
    queue.set_descriptor(7, BUFFER, 16, DESC_F_INDIRECT, 0)
    queue.set_descriptor(0, queue.descriptors + 7 * 16, 16, DESC_F_INDIRECT, 0)
    queue.put_available(0)


def table_that_loops(queue: DriverQueue) -> None:
    for index in range(2):
        queue.set_descriptor(6 + index, BUFFER, 1, DESC_F_NEXT, index ^ 1)
    queue.set_descriptor(0, queue.descriptors + 6 * 16, 32, DESC_F_INDIRECT, 0)
    queue.put_available(0)


def too_many_bytes(queue: DriverQueue) -> None:
    queue.set_descriptor(0, BUFFER, 0xFFFFFFFF, DESC_F_NEXT, 1)
    queue.put_available(0)


def same_chain_again_and_again(queue: DriverQueue) -> None:
    queue.set_avail_index(9)


HOSTILE = {
    "a head outside of the table": head(8),
    "a head far outside": head(0xFFFF),
    "a next outside of the table": one(BUFFER, 1, DESC_F_NEXT, 8),
    "a buffer of no bytes": one(BUFFER, 0, 0),
    "a buffer behind RAM": one(RAM, 1, 0),
    "a buffer across the end of RAM": one(RAM - 4, 8, DESC_F_WRITE),
    "a buffer that overflows": one((1 << 64) - 4, 8, DESC_F_WRITE),
    "a loop": loop,
    "readable behind writable": readable_behind_writable,
    "an indirect table of no bytes": one(BUFFER, 0, DESC_F_INDIRECT),
    "an indirect table of half an entry": one(BUFFER, 24, DESC_F_INDIRECT),
    "an indirect table with a next": one(BUFFER, 16, DESC_F_INDIRECT | DESC_F_NEXT),
    "an indirect table outside of RAM": one(RAM, 16, DESC_F_INDIRECT),
    "an indirect table too large": one(0, 16 * (MOST_DESCRIPTORS + 1), DESC_F_INDIRECT),
    "an indirect table in an indirect table": table_in_table,
    "an indirect table that loops": table_that_loops,
    "a chain of too many bytes": too_many_bytes,
    "an index that jumped": same_chain_again_and_again,
}


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_cannot_be_asks_for_a_reset_and_writes_nothing(
    case: Callable[[DriverQueue], None], event_idx: bool
) -> None:
    guest = driver(event_idx=event_idx, indirect=True)
    case(guest.queue(0))
    used = guest.queue(0).used_index
    buffers = bytes(guest.memory[BUFFER:])
    guest.kick(0)
    assert guest.needs_reset
    assert len(guest.faults) == 1
    assert guest.queue(0).used_index == used
    assert bytes(guest.memory[BUFFER:]) == buffers


def test_an_indirect_table_that_was_not_negotiated_asks_for_a_reset() -> None:
    guest = driver()
    one(BUFFER, 16, DESC_F_INDIRECT)(guest.queue(0))
    guest.kick(0)
    assert guest.needs_reset


def test_a_chain_offered_twice_before_it_came_back_is_served_twice() -> None:
    guest = driver()
    guest.queue(0).set_descriptor(0, BUFFER, 4, DESC_F_WRITE, 0)
    guest.queue(0).put_available(0)
    guest.queue(0).put_available(0)
    guest.kick(0)
    assert (guest.queue(0).used_index, guest.needs_reset) == (2, False)


def test_more_chains_than_the_queue_holds_cannot_be_out() -> None:
    guest = driver()
    queue = guest.device.queues[0]
    guest.queue(0).set_descriptor(0, BUFFER, 4, DESC_F_WRITE, 0)
    for _ in range(8):
        guest.queue(0).put_available(0)
        assert queue.pop() is not None
    guest.queue(0).put_available(0)
    with pytest.raises(GuestFault):
        queue.pop()


@given(st.binary(min_size=RAM // 64, max_size=RAM // 64), st.integers(0, 0xFFFF), st.booleans(), st.booleans())
def test_any_rings_at_all_leave_the_host_standing(noise: bytes, index: int, event_idx: bool, indirect: bool) -> None:
    guest = driver(event_idx=event_idx, indirect=indirect)
    guest.memory[: len(noise)] = noise
    guest.queue(0).set_avail_index(index)
    guest.kick(0)
    assert guest.needs_reset or guest.device.queues[0].available() == 0


@given(st.lists(st.tuples(st.integers(0, 1 << 17), st.integers(0, 1 << 17)), max_size=4), st.integers(-1, 1 << 64))
def test_a_view_gives_what_lies_in_one_region_and_nothing_else(spans: list[tuple[int, int]], address: int) -> None:
    low, high = memoryview(bytearray(4096)), memoryview(bytearray(8192))
    view = GuestView([(0, low), (0x10000, high)])
    for start, size in [*spans, (address, 8)]:
        inside = 0 <= start <= start + size <= 4096 or 0x10000 <= start <= start + size <= 0x12000
        try:
            assert len(view.view(start, size)) == size
            assert inside
        except GuestFault:
            assert not inside


def test_what_the_host_writes_is_marked_for_snapshots() -> None:
    guest = driver()
    guest.dirty.clear()
    guest.send(0, [], [16])
    guest.kick(0)
    marked = {byte for start, size in guest.dirty for byte in range(start, start + size)}
    queue = guest.queue(0)
    buffer = (queue.device_area + 6 + 8 * 8 + 15) & ~15
    assert set(range(buffer, buffer + 16)) <= marked
    assert set(range(queue.device_area, queue.device_area + 12)) <= marked
