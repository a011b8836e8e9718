"""MemoryWriter against a model: a file reads as the memory did, zeros are holes, and a map says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncvmm.errors import SnapshotFailed
from asyncvmm.snapshot import memory_writer
from asyncvmm.snapshot.extents import data_runs
from asyncvmm.snapshot.memory_map import PAGE_BYTES, MemoryMap, runs_of
from asyncvmm.snapshot.memory_writer import PIECE_BYTES, MemoryWriter, begin_write_back, nonzero_pages
from tests.support.snapshots import page

ROOT = Path(__file__).parents[3]

PAGES = 40
SIZE = PAGES * PAGE_BYTES

CONTENTS = {
    "zeros": bytes(PAGE_BYTES),
    "data": page("data"),
    "other data": page("other"),
    "zeros first": bytes(8) + b"x" + bytes(PAGE_BYTES - 9),
    "last byte": bytes(PAGE_BYTES - 1) + b"x",
    "first byte": b"x" + bytes(PAGE_BYTES - 1),
}
NAMES = st.sampled_from(sorted(CONTENTS))


class Written(RuleBasedStateMachine):
    """Any sequence of writes, whatever they overwrite."""

    @initialize(is_difference=st.booleans())
    def begin(self, is_difference: bool) -> None:
        self.fd = os.memfd_create("memory")
        self.writer = MemoryWriter(self.fd, SIZE, is_difference=is_difference)
        self.is_difference = is_difference
        self.memory = bytearray(SIZE)
        self.kinds = bytearray(PAGES)

    @rule(first=st.integers(0, PAGES - 1), names=st.lists(NAMES, min_size=1, max_size=PAGES))
    def write(self, first: int, names: list[str]) -> None:
        pages = [CONTENTS[name] for name in names[: PAGES - first]]
        self.writer.write(first * PAGE_BYTES, b"".join(pages))
        for number, content in enumerate(pages, first):
            self._becomes(number, content)

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, 30), name=NAMES)
    def write_the_same(self, first: int, count: int, name: str) -> None:
        self.write(first, [name] * count)

    @rule(kinds=st.binary(min_size=PAGES, max_size=PAGES), names=st.lists(NAMES, min_size=1, max_size=8))
    def write_runs(self, kinds: bytes, names: list[str]) -> None:
        memory = b"".join(CONTENTS[names[kind % len(names)]] for kind in kinds)
        runs = runs_of(bytes(kind & 1 for kind in kinds), 1)
        with memoryview(memory) as view:
            self.writer.write_runs(view, runs)
        for offset, size in runs:
            for at in range(offset, offset + size, PAGE_BYTES):
                self._becomes(at // PAGE_BYTES, memory[at : at + PAGE_BYTES])

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(0, PAGES))
    def zero(self, first: int, count: int) -> None:
        count = min(count, PAGES - first)
        self.writer.zero(first * PAGE_BYTES, count * PAGE_BYTES)
        for number in range(first, first + count):
            self._becomes(number, bytes(PAGE_BYTES))

    def _becomes(self, number: int, content: bytes) -> None:
        self.memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = content
        self.kinds[number] = 1 if any(content) else 2 if self.is_difference else 0

    @invariant()
    def the_file_is_the_memory(self) -> None:
        assert os.pread(self.fd, SIZE + 1, 0) == self.memory

    @invariant()
    def only_data_is_no_hole(self) -> None:
        assert data_runs(self.fd, SIZE) == runs_of(self.kinds, 1)

    @invariant()
    def the_map_says_so(self) -> None:
        expected = MemoryMap(
            size=SIZE, data=runs_of(self.kinds, 1), zero=runs_of(self.kinds, 2), is_difference=self.is_difference
        )
        assert self.writer.map() == expected
        assert MemoryMap.from_plain(expected.to_plain()) == expected

    def teardown(self) -> None:
        os.close(self.fd)


TestWritten = Written.TestCase
TestWritten.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("memory")
    yield made
    os.close(made)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data)).cast("Q")])
def test_any_contiguous_buffer_is_written(fd: int, kind: type) -> None:
    writer = MemoryWriter(fd, SIZE)
    writer.write(PAGE_BYTES, kind(page(1) + page(2)))
    assert os.pread(fd, 2 * PAGE_BYTES, PAGE_BYTES) == page(1) + page(2)
    assert writer.bytes_written == 2 * PAGE_BYTES


def test_pieces_end_where_nothing_is_lost(fd: int) -> None:
    data = b"".join(
        page(number) if number % 7 else bytes(PAGE_BYTES) for number in range(3 * PIECE_BYTES // PAGE_BYTES)
    )
    writer = MemoryWriter(fd, 4 * PIECE_BYTES)
    writer.write(PIECE_BYTES // 2, data)
    assert os.pread(fd, len(data), PIECE_BYTES // 2) == data
    assert (
        writer.map().data_bytes
        == writer.bytes_written
        == sum(PAGE_BYTES for number in range(3 * PIECE_BYTES // PAGE_BYTES) if number % 7)
    )


def test_a_view_can_be_closed_once_it_is_written(fd: int) -> None:
    memory = bytearray(SIZE)
    memory[0] = 1
    writer = MemoryWriter(fd, SIZE)
    with memoryview(memory) as view:
        writer.write(0, view)
    memory.extend(b"no export is left")


@pytest.mark.parametrize(
    ("offset", "size"), [(1, PAGE_BYTES), (0, 1), (-PAGE_BYTES, PAGE_BYTES), (SIZE, PAGE_BYTES), (0, SIZE + PAGE_BYTES)]
)
def test_what_is_no_whole_page_of_memory_is_refused(fd: int, offset: int, size: int) -> None:
    writer = MemoryWriter(fd, SIZE)
    with pytest.raises(ValueError, match="no whole pages"):
        writer.write(offset, bytes(size))
    with pytest.raises(ValueError, match="no whole pages"):
        writer.zero(offset, size)


@pytest.mark.parametrize("run", [(1, PAGE_BYTES), (0, 1), (-PAGE_BYTES, PAGE_BYTES), (PAGE_BYTES // 2, PAGE_BYTES)])
def test_a_run_that_is_no_whole_page_of_memory_is_refused(fd: int, run: tuple[int, int]) -> None:
    writer = MemoryWriter(fd, SIZE)
    with pytest.raises(ValueError, match="no whole pages"):
        writer.write_runs(memoryview(bytes(SIZE)), [run])
    with pytest.raises(ValueError, match=f"where memory has {SIZE}"):
        writer.write_runs(memoryview(bytes(PAGE_BYTES)), [])


@pytest.mark.parametrize("size", [0, -PAGE_BYTES, PAGE_BYTES + 1])
def test_memory_that_is_no_whole_pages_is_refused(fd: int, size: int) -> None:
    with pytest.raises(SnapshotFailed):
        MemoryWriter(fd, size)


def test_zeros_are_written_where_there_are_no_holes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system without holes is at hand: the call that makes them says what such a one says."""
    monkeypatch.setattr(memory_writer, "punch_hole", lambda *_: False)
    writer = MemoryWriter(fd, SIZE)
    writer.write(0, page(1) + page(2))
    writer.write(0, bytes(PAGE_BYTES) + page(2))
    assert os.pread(fd, 2 * PAGE_BYTES, 0) == bytes(PAGE_BYTES) + page(2)
    assert writer.map().data == ((PAGE_BYTES, PAGE_BYTES),)


def test_a_large_run_is_on_its_way_to_disk_once_it_is_written(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = _sent(monkeypatch)
    writer = MemoryWriter(fd, 4 * PIECE_BYTES)
    writer.write(0, page(1))
    writer.write(PIECE_BYTES, bytes(PIECE_BYTES))
    assert not sent
    writer.write(PIECE_BYTES, page(1) * (2 * PIECE_BYTES // PAGE_BYTES))
    assert sent == [(PIECE_BYTES, PIECE_BYTES), (2 * PIECE_BYTES, PIECE_BYTES)]


def test_a_disk_that_lets_one_wait_is_not_bothered_again(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call blocks where a disk's queue is full, which none at hand is."""
    sent = _sent(monkeypatch, 0.05)
    writer = MemoryWriter(fd, 4 * PIECE_BYTES)
    writer.write(0, page(1) * (4 * PIECE_BYTES // PAGE_BYTES))
    assert sent == [(0, PIECE_BYTES)]
    assert os.pread(fd, PAGE_BYTES, 3 * PIECE_BYTES) == page(1)


def _sent(monkeypatch: pytest.MonkeyPatch, seconds: float = 0) -> list[tuple[int, int]]:
    """What is sent, each call taking so long by a clock that knows nothing of how busy the machine is."""
    sent: list[tuple[int, int]] = []

    def begin_write_back(fd: int, offset: int, size: int) -> None:
        sent.append((offset, size))

    clock = SimpleNamespace(monotonic_ns=lambda: int(len(sent) * seconds * 1e9))
    monkeypatch.setattr(memory_writer, "time", clock)
    monkeypatch.setattr(memory_writer, "begin_write_back", begin_write_back)
    return sent


def test_where_nothing_can_be_sent_ahead_that_is_no_error() -> None:
    reader, writer = os.pipe()
    begin_write_back(writer, 0, PAGE_BYTES)  # ESPIPE, as of a file system without it
    os.close(reader)
    os.close(writer)
    begin_write_back(writer, 0, PAGE_BYTES)


def test_a_closed_file_is_a_typed_error() -> None:
    fd = os.memfd_create("memory")
    writer = MemoryWriter(fd, SIZE)
    os.close(fd)
    with pytest.raises(SnapshotFailed, match="Bad file descriptor"):
        writer.write(0, page(1))


def test_a_file_that_may_grow_no_further_is_a_typed_error(tmp_path: Path) -> None:
    program = [sys.executable, "-c", _A_SHORT_FILE, str(tmp_path / "memory")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "SnapshotFailed: memory file: expected room for it, found File too large" in done.stderr


_A_SHORT_FILE = """
import os, resource, signal, sys
from asyncvmm.snapshot.memory_writer import MemoryWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = MemoryWriter(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), 1 << 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
writer.write(0, b"x" * 16384)
writer.write(0, b"x" * 32768)
"""


def test_every_byte_of_a_page_counts() -> None:
    for at in range(0, PAGE_BYTES, 61):
        pages = bytearray(20 * PAGE_BYTES)
        pages[3 * PAGE_BYTES + at] = pages[18 * PAGE_BYTES + at] = 1
        with memoryview(pages) as view:
            assert [number for number, kind in enumerate(nonzero_pages(view)) if kind] == [3, 18]
