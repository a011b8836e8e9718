from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from asyncvmm.errors import KernelError
from asyncvmm.x86.elf import ElfKernel, parse_elf
from asyncvmm.x86.layout import Region

Build = Callable[..., bytes]


def parse(image: bytes) -> ElfKernel:
    return parse_elf(memoryview(image))


def test_an_elf_without_the_note_has_the_64_bit_entry_only(elf: Build) -> None:
    kernel = parse(elf())
    assert (kernel.entry, kernel.pvh_entry) == (0x1000000, None)
    assert kernel.segments[0].data == b"\xf4" * 64
    assert kernel.work_area == Region(0x1000000, 4096)


def test_the_pvh_note_is_found_among_others(elf: Build, pvh_note: bytes) -> None:
    assert parse(elf(notes=pvh_note)).pvh_entry == 0x1000010


def test_the_pvh_note_may_hold_eight_bytes(elf: Build, note: Build) -> None:
    assert parse(elf(notes=note(b"Xen\0", 18, struct.pack("<Q", 0x1000020)))).pvh_entry == 0x1000020


def test_segments_are_sorted_and_span_the_work_area(elf: Build) -> None:
    kernel = parse(elf([(0x2000000, b"b", 8192), (0x1000000, b"a", 1)]))
    assert [segment.address for segment in kernel.segments] == [0x1000000, 0x2000000]
    assert kernel.work_area == Region(0x1000000, 0x1002000)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([(0xFFFFF, b"x", 16)], "ELF segment's address"),
        ([(0x7000, b"x", 16)], "ELF segment's address"),
        ([(0xBFFFFFFF, b"x", 2)], "ELF segment's address"),
        ([(2**64 - 1, b"x", 2)], "ELF segment's address"),
        ([(0x1000000, b"x", 2**64 - 1)], "ELF segment's address"),
        ([(0x1000000, b"xy", 1)], "ELF segment's filesz"),
        ([(0x1000000, b"x", 4096), (0x1000FFF, b"x", 1)], "overlapping ELF segment"),
        ([(0x1000000, b"", 0)], "at least one PT_LOAD"),
    ],
)
def test_segments_out_of_place_are_refused(elf: Build, segments: list[tuple[int, bytes, int]], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        parse(elf(segments))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"phentsize": 32}, "program header size: expected 56, found 32"),
        ({"phnum": 0}, "program headers: expected 1 to 256, found 0"),
        ({"phnum": 0xFFFF}, "program headers: expected 1 to 256, found 65535"),
        ({"phoff": 2**64 - 1}, "outside the file"),
        ({"entry": 0x1000040}, "ELF entry: expected an address inside a loaded segment, found 0x1000040"),
    ],
)
def test_a_bad_header_field_is_refused(elf: Build, fields: dict[str, int], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        parse(elf(**fields))


def test_a_truncated_elf_is_refused(elf: Build) -> None:
    with pytest.raises(KernelError, match="ELF segment outside the file"):
        parse(elf()[:-1])
    with pytest.raises(KernelError, match="truncated ELF"):
        parse(elf()[:63])


def test_a_pvh_entry_outside_the_file_s_code_is_refused(elf: Build, note: Build) -> None:
    with pytest.raises(KernelError, match="PVH entry"):
        parse(elf(notes=note(b"Xen\0", 18, struct.pack("<I", 0x1000FFF))))


def test_a_pvh_note_of_odd_size_is_refused(elf: Build, note: Build) -> None:
    with pytest.raises(KernelError, match="PVH note"):
        parse(elf(notes=note(b"Xen\0", 18, b"abc")))


@pytest.mark.parametrize("sizes", [(0xFFFFFFFF, 4), (4, 0xFFFFFFFF), (0, 0xFFFFFFF0)])
def test_a_note_that_leaves_its_table_ends_the_search(elf: Build, sizes: tuple[int, int]) -> None:
    notes = struct.pack("<III", *sizes, 18) + b"Xen\0" + bytes(8)
    assert parse(elf(notes=notes)).pvh_entry is None


def test_a_table_of_a_million_empty_notes_is_not_walked_whole(elf: Build, pvh_note: bytes) -> None:
    assert parse(elf(notes=bytes(12 * 1_000_000) + pvh_note)).pvh_entry is None
