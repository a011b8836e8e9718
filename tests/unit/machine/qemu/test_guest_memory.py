"""The file that is a QEMU's RAM."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncvmm.errors import MachineError, SnapshotDamaged, SnapshotFailed
from asyncvmm.machine.qemu.guest_memory import GuestMemory
from asyncvmm.machine.saved import MemoryLayer
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.snapshot.memory_writer import MemoryWriter

PAGE = 4096
SIZE = 64 * PAGE
CONTENT = {0: b"first", 7 * PAGE: b"seventh", SIZE - PAGE: b"last"}


def proceed() -> None:
    """Go on."""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.new(SIZE)
    for offset, data in CONTENT.items():
        os.pwrite(memory.fd, data.ljust(PAGE, b"."), offset)
    yield memory
    memory.close()


@pytest.fixture
def layer(memory: GuestMemory, tmp_path: Path) -> Iterator[MemoryLayer]:
    with (tmp_path / "memory").open("w+b") as file:
        writer = MemoryWriter(file.fileno(), SIZE)
        memory.copy_to(writer, proceed)
        yield MemoryLayer(fd=file.fileno(), map=writer.map())


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0)


def test_what_is_there_is_copied_and_holes_are_not(memory: GuestMemory, layer: MemoryLayer) -> None:
    assert content(layer.fd) == content(memory.fd)
    assert layer.map.data == tuple((offset, PAGE) for offset in CONTENT)


def test_new_memory_cannot_shrink(memory: GuestMemory) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 2 * SIZE)


def test_a_copy_can_be_ended_by_whoever_waits_for_it(memory: GuestMemory, tmp_path: Path) -> None:
    def stop() -> None:
        raise SnapshotFailed("ended")

    with (tmp_path / "memory").open("w+b") as file, pytest.raises(SnapshotFailed, match="ended"):
        memory.copy_to(MemoryWriter(file.fileno(), SIZE), stop)


def test_memory_that_was_let_go_of_is_not_copied(memory: GuestMemory, tmp_path: Path) -> None:
    memory.close()
    memory.close()
    with (tmp_path / "memory").open("w+b") as file, pytest.raises(MachineError):
        memory.copy_to(MemoryWriter(file.fileno(), SIZE), proceed)


def test_a_snapshots_file_itself_is_a_clones_memory(layer: MemoryLayer) -> None:
    clone = GuestMemory.of_snapshot(layer, SIZE, gives_back=False)
    assert not clone.shared
    assert os.path.sameopenfile(clone.fd, layer.fd)
    clone.close()
    os.fstat(layer.fd)


def test_where_memory_may_be_given_back_it_is_a_copy(layer: MemoryLayer) -> None:
    clone = GuestMemory.of_snapshot(layer, SIZE, gives_back=True)
    assert clone.shared
    assert content(clone.fd) == content(layer.fd)
    assert os.fstat(clone.fd).st_blocks * 512 == len(CONTENT) * PAGE
    with mmap.mmap(clone.fd, SIZE) as mapping:
        mapping[:5] = b"other"
    assert content(layer.fd).startswith(b"first")
    clone.close()


@pytest.mark.parametrize("gives_back", [False, True])
def test_a_file_that_is_too_short_is_damaged(layer: MemoryLayer, gives_back: bool) -> None:
    os.ftruncate(layer.fd, SIZE - PAGE)
    with pytest.raises(SnapshotDamaged, match=f"expected {SIZE} bytes"):
        GuestMemory.of_snapshot(layer, SIZE, gives_back=gives_back)


def test_a_difference_is_no_memory(layer: MemoryLayer) -> None:
    difference = MemoryLayer(fd=layer.fd, map=MemoryMap(size=SIZE, is_difference=True))
    with pytest.raises(SnapshotDamaged, match="a difference"):
        GuestMemory.of_snapshot(difference, SIZE, gives_back=False)
