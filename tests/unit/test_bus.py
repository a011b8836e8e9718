from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.bus import Bus
from asyncvmm.errors import ConfigError


class Memory:
    """Registers that hold what is written to them."""

    def __init__(self, size: int, lock: threading.Lock | None = None) -> None:
        self.cells = bytearray(size)
        self.lock = lock

    def read(self, offset: int) -> int:
        assert self.lock is None or self.lock.locked()
        return self.cells[offset]

    def write(self, offset: int, value: int) -> None:
        assert self.lock is None or self.lock.locked()
        self.cells[offset] = value


def free() -> AbstractContextManager[object]:
    return nullcontext()


def test_an_access_reaches_its_device_at_its_offset() -> None:
    bus, device = Bus(), Memory(8)
    bus.attach("device", 0x3F8, 8, device, free())
    bus.write(0x3FF, 0x5A, 1)
    assert device.cells[7] == 0x5A
    assert bus.read(0x3FF, 1) == 0x5A


def test_the_devices_lock_is_held_during_an_access_and_free_after_it() -> None:
    lock = threading.Lock()
    bus, device = Bus(), Memory(1, lock)
    bus.attach("device", 0x10, 1, device, lock)
    bus.write(0x10, 1, 1)
    bus.read(0x10, 1)
    assert not lock.locked()


def test_a_wide_access_is_split_over_adjacent_devices() -> None:
    bus, low, high = Bus(), Memory(2), Memory(2)
    bus.attach("low", 0x70, 2, low, free())
    bus.attach("high", 0x72, 2, high, free())
    bus.write(0x70, 0x44332211, 4)
    assert (bytes(low.cells), bytes(high.cells)) == (b"\x11\x22", b"\x33\x44")
    assert bus.read(0x71, 2) == 0x3322
    assert bus.unmapped == 0


def test_unmapped_accesses_read_all_ones_and_count_once_each() -> None:
    bus, device = Bus(), Memory(1)
    bus.attach("device", 0x80, 1, device, free())
    assert bus.read(0x90, 1) == 0xFF
    assert bus.read(0x90, 4) == 0xFFFFFFFF
    assert bus.read(0x7F, 2) == 0x00FF
    bus.write(0x81, 0xFFFF, 2)
    assert bus.read_mmio(0xC0000000, 8) == (1 << 64) - 1
    bus.write_mmio(0xC0000000, 1, 4)
    assert bus.unmapped == 6


def test_a_wide_access_at_the_last_port_does_not_wrap_to_the_first() -> None:
    bus, first = Bus(), Memory(1)
    bus.attach("device", 0, 1, first, free())
    bus.attach("last", 0xFFFF, 1, Memory(1), free())
    bus.write(0xFFFF, 0xAABB, 2)
    assert first.cells == b"\x00"
    assert bus.read(0xFFFF, 2) == 0xFFBB


class Words:
    """A device in memory that says what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return 0x1122334455667788 & (1 << 8 * size) - 1

    def write(self, offset: int, value: int, size: int) -> None:
        self.seen.append((offset, value, size))


def test_an_access_to_device_memory_arrives_whole() -> None:
    bus, device = Bus(), Words()
    bus.attach_mmio("device", 0xC0001000, 0x1000, device, free())
    assert bus.read_mmio(0xC0001070, 4) == 0x55667788
    bus.write_mmio(0xC0001FF8, 1 << 63, 8)
    assert device.seen == [(0x70, 4), (0xFF8, 1 << 63, 8)]


def test_an_access_across_the_end_of_device_memory_meets_nobody() -> None:
    bus, device = Bus(), Words()
    bus.attach_mmio("device", 0xC0001000, 0x1000, device, free())
    assert bus.read_mmio(0xC0001FFE, 4) == 0xFFFFFFFF
    bus.write_mmio(0xC0001FFE, 0, 4)
    assert (device.seen, bus.unmapped) == ([], 2)


def test_ports_and_memory_are_spaces_apart() -> None:
    bus, port, memory = Bus(), Memory(1), Words()
    bus.attach("port", 0x100, 1, port, free())
    bus.attach_mmio("memory", 0x100, 1, memory, free())
    bus.write_mmio(0x100, 7, 1)
    assert (port.cells[0], memory.seen, bus.read_mmio(0x100, 1)) == (0, [(0, 7, 1), (0, 1)], 0x88)


@pytest.mark.parametrize(("first", "size"), [(0x3F0, 9), (0x3FF, 1), (0x3F8, 8), (0x3FA, 2), (0x300, 0x200)])
def test_an_overlapping_range_is_refused(first: int, size: int) -> None:
    bus = Bus()
    bus.attach("device", 0x3F8, 8, Memory(8), free())
    with pytest.raises(ConfigError, match="0x3f8 to 0x3ff"):
        bus.attach("other", first, size, Memory(size), free())
    bus.attach("below", 0x3F0, 8, Memory(8), free())
    bus.attach("above", 0x400, 8, Memory(8), free())


@pytest.mark.parametrize(("first", "size"), [(-1, 2), (0xFFFF, 2), (0x10000, 1), (0x10, 0), (0x10, -1)])
def test_a_range_outside_the_ports_is_refused(first: int, size: int) -> None:
    with pytest.raises(ConfigError):
        Bus().attach("device", first, size, Memory(1), free())


def test_a_name_is_given_once() -> None:
    bus = Bus()
    bus.attach("rtc", 0x10, 1, Memory(1), free())
    with pytest.raises(ConfigError):
        bus.attach_mmio("rtc", 0x20, 1, Words(), free())


def test_attachments_come_in_order_and_by_name() -> None:
    bus = Bus()
    bus.attach_mmio("blk", 0xC0001000, 4096, Words(), free())
    bus.attach("device", 0x3F8, 8, Memory(8), free())
    bus.attach("rtc", 0x70, 2, Memory(2), free())
    assert [attachment.name for attachment in bus.attachments()] == ["rtc", "device", "blk"]


def test_lookup_gives_what_a_hot_path_needs() -> None:
    bus, device, lock = Bus(), Memory(8), threading.Lock()
    attached = bus.attach("device", 0x2F8, 8, device, lock)
    found = bus.lookup(0x2FF)
    assert found is attached
    assert (found.device, found.first, found.lock) == (device, 0x2F8, lock)
    assert bus.lookup(0x300) is None
    assert bus.lookup(0x2F7) is None


@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(1, 16)), max_size=12),
    st.integers(0, 63),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 4]),
)
def test_the_bus_acts_as_one_memory_with_holes(ranges: list[tuple[int, int]], port: int, value: int, size: int) -> None:
    bus, mapped = Bus(), set[int]()
    for number, (first, length) in enumerate(ranges):
        wanted = set(range(first, first + length))
        if wanted & mapped:
            with pytest.raises(ConfigError):
                bus.attach(str(number), first, length, Memory(length), free())
        else:
            bus.attach(str(number), first, length, Memory(length), free())
            mapped |= wanted
    bus.write(port, value, size)
    expected = [value >> 8 * index & 0xFF if port + index in mapped else 0xFF for index in range(size)]
    assert bus.read(port, size) == int.from_bytes(bytes(expected), "little")
    assert all((bus.lookup(number) is not None) == (number in mapped) for number in range(80))


def test_a_write_to_a_watched_port_is_told_byte_by_byte() -> None:
    bus, device, told = Bus(), Memory(1), list[tuple[int, int]]()
    bus.attach("device", 0x7C, 1, device, free())
    for port in (0x7B, 0x7D):
        bus.watch(port, lambda value, port=port: told.append((port, value)))  # type: ignore[misc]
    bus.write(0x7B, 0x44332211, 4)
    assert told == [(0x7B, 0x11), (0x7D, 0x33)]
    assert device.cells == b"\x22"
    assert bus.unmapped == 1
    assert bus.read(0x7B, 1) == 0xFF
    bus.unwatch(0x7B)
    bus.unwatch(0x7B)
    bus.write(0x7B, 5, 1)
    assert len(told) == 2


@pytest.mark.parametrize("port", [0x3F8, 0x3FF, -1, 0x10000])
def test_a_port_of_a_device_or_none_at_all_is_not_watched(port: int) -> None:
    bus = Bus()
    bus.attach("com1", 0x3F8, 8, Memory(8), free())
    with pytest.raises(ConfigError, match="without a device"):
        bus.watch(port, print)
