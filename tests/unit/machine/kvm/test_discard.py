"""Pages given back: real mappings, measured in /proc/self/smaps."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.discard import Backing, GuestDiscard, Runs, discard
from asyncvmm.x86.layout import Region

PAGE = 4096
SIZE = 4 << 20
SMALL_PAGES_ONLY = 15  # MADV_NOHUGEPAGE: what is resident is then exactly what was touched


class Mapped:
    """A mapping whose every page holds ones."""

    def __init__(self, flags: int, fd: int = -1, size: int = SIZE) -> None:
        self.map = mmap.mmap(fd, size, flags)
        self.map.madvise(SMALL_PAGES_ONLY)
        self.map[:] = b"\1" * size
        self.size = size
        self._pin = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._pin)

    def rss(self) -> int:
        """Resident bytes between the mapping's two ends."""
        return sum(_resident(self.address, self.address + self.size))

    def close(self) -> None:
        """Unmap."""
        del self._pin
        self.map.close()


def _resident(first: int, last: int) -> Iterator[int]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = first <= int(bounds[1], 16) and int(bounds[2], 16) <= last
        elif inside and line.startswith("Rss:"):
            yield int(line.split()[1]) * 1024


@pytest.fixture
def file_of_ones(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"\1" * SIZE)
    return path


@pytest.fixture(params=["anonymous", "private-file", "shared"])
def backing(request: pytest.FixtureRequest) -> Backing:
    kind: Backing = request.param
    return kind


@pytest.fixture
def mapped(backing: Backing, file_of_ones: Path) -> Iterator[Mapped]:
    if backing == "anonymous":
        mapping = Mapped(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elif backing == "private-file":
        with file_of_ones.open("rb+") as file:
            mapping = Mapped(mmap.MAP_PRIVATE, file.fileno())
    else:
        memfd = os.memfd_create("guest")
        os.truncate(memfd, SIZE)
        mapping = Mapped(mmap.MAP_SHARED, memfd)
        os.close(memfd)
    yield mapping
    mapping.close()


def test_what_is_given_back_leaves_memory_and_comes_back_as_zeros(mapped: Mapped, backing: Backing) -> None:
    assert mapped.rss() >= SIZE
    discard(mapped.address + SIZE // 4, SIZE // 2, backing)
    assert mapped.rss() <= SIZE // 2 + SIZE // 64
    assert mapped.map[SIZE // 4 : SIZE // 4 * 3] == bytes(SIZE // 2)
    assert mapped.map[: SIZE // 4] == b"\1" * (SIZE // 4)
    assert mapped.map[SIZE // 4 * 3 :] == b"\1" * (SIZE // 4)


def test_what_is_given_back_can_be_written_again(mapped: Mapped, backing: Backing) -> None:
    discard(mapped.address, PAGE, backing)
    mapped.map[:3] = b"new"
    assert mapped.map[:4] == b"new\0"


def test_a_clone_gives_back_pages_that_it_never_wrote(file_of_ones: Path) -> None:
    with file_of_ones.open("rb+") as file, mmap.mmap(file.fileno(), SIZE, mmap.MAP_PRIVATE) as clone:
        pin = ctypes.c_char.from_buffer(clone)
        discard(ctypes.addressof(pin), SIZE, "private-file")
        del pin
        assert clone[:] == bytes(SIZE)
    assert file_of_ones.read_bytes() == b"\1" * SIZE


def test_what_the_kernel_refuses_is_an_oserror(mapped: Mapped, backing: Backing) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        discard(mapped.address + 1, PAGE, backing)


# -- a guest's ---------------------------------------------------------------------------------------------------------

REGIONS = (Region(0, SIZE // 2), Region(0x1_0000_0000, SIZE // 2))


def test_guest_addresses_lead_to_where_their_region_is_mapped(mapped: Mapped, backing: Backing) -> None:
    dirty: list[tuple[int, int]] = []
    guest = GuestDiscard(REGIONS, mapped.address, backing, on_discard=lambda *span: dirty.append(span))
    assert guest.release([(PAGE, PAGE), (0x1_0000_0000, 2 * PAGE)]) == 3 * PAGE
    assert dirty == [(PAGE, PAGE), (0x1_0000_0000, 2 * PAGE)]
    zeros = [page for page in range(SIZE // PAGE) if not mapped.map[page * PAGE]]
    assert zeros == [1, SIZE // 2 // PAGE, SIZE // 2 // PAGE + 1]


def test_what_is_not_ram_is_refused_and_the_rest_given_back(mapped: Mapped, backing: Backing) -> None:
    guest = GuestDiscard(REGIONS, mapped.address, backing)
    assert guest.release([(SIZE // 2 - PAGE, 2 * PAGE), (0, PAGE)]) == PAGE
    assert guest.refused == 2 * PAGE


def test_a_clone_takes_no_more_mappings_than_it_may(file_of_ones: Path) -> None:
    with file_of_ones.open("rb+") as file:
        mapping = Mapped(mmap.MAP_PRIVATE, file.fileno())
    guest = GuestDiscard([Region(0, SIZE)], mapping.address, "private-file", most_runs=8)
    every_other = [(page * PAGE, PAGE) for page in range(0, 40, 2)]
    assert guest.release(every_other) == 8 * PAGE
    assert guest.refused == 12 * PAGE
    assert guest.release([(0, 40 * PAGE)]) == 40 * PAGE, "what joins them is one place"
    mapping.map[: 40 * PAGE] = b"\1" * (40 * PAGE)
    assert guest.release(every_other) == 20 * PAGE, "and what is in it costs nothing"
    assert all(mapping.map[address] == 0 for address, _ in every_other)
    mapping.close()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=30))
def test_runs_are_what_a_set_of_their_numbers_would_be(spans: list[tuple[int, int]]) -> None:
    runs, model = Runs(), set[int]()
    for start, size in spans:
        assert runs.covers(start, start + size) == (set(range(start, start + size)) <= model)
        model |= set(range(start, start + size))
        expected = runs.count_with(start, start + size)
        runs.add(start, start + size)
        assert len(runs) == expected == sum(number - 1 not in model for number in model)
