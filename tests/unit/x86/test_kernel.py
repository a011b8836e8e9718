from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import KernelError
from asyncvmm.x86.bzimage import BzImage
from asyncvmm.x86.elf import ElfKernel
from asyncvmm.x86.kernel import inspect_kernel

Build = Callable[..., bytes]


def found_in(image: bytes) -> str:
    with pytest.raises(KernelError) as caught:
        inspect_kernel(image)
    return str(caught.value.found)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "an empty file"),
        (b"hello, world\n" * 100, "a text file"),
        ("grüße ".encode() * 100, "a text file"),
        (b"#!/bin/sh\necho hi\n", "a script"),
        (gzip.compress(b"x" * 5000), "a gzip stream"),
        (lzma.compress(b"x" * 5000), "an xz stream"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "a zstd stream"),
        (b"070701" + b"0" * 104, "a cpio archive"),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(2000), "an arm64 Image"),
        (b"MZ" + bytes(2000), "a DOS or EFI program without a Linux setup header"),
        (bytes(510) + b"\x55\xaa" + bytes(1000), "a boot sector without a Linux setup header"),
        (bytes(4096), "a file that starts with zeros"),
        (b"\x00\x01\x02\xff", "a file of 4 bytes that starts with 00 01 02 ff"),
    ],
)
def test_what_is_not_a_kernel_is_said_in_words(image: bytes, words: str) -> None:
    assert found_in(image) == words


def test_elfs_of_other_kinds_are_named(elf: Build) -> None:
    assert found_in(elf(machine=183)) == "an ELF for aarch64"
    assert found_in(elf(elf_class=1)) == "a 32-bit little-endian ELF"
    assert found_in(elf(byte_order=2)) == "a 64-bit big-endian ELF"
    assert found_in(elf(type=3)) == "a shared object"


def test_the_host_s_python_is_not_a_kernel() -> None:
    python = Path("/proc/self/exe").read_bytes()
    with pytest.raises(KernelError):
        inspect_kernel(python)


def test_kernels_are_told_apart(elf: Build, bzimage: Build) -> None:
    assert isinstance(inspect_kernel(bzimage()), BzImage)
    assert isinstance(inspect_kernel(memoryview(elf())), ElfKernel)


@given(image=st.binary(max_size=2048))
def test_no_bytes_raise_anything_but_kernel_error(image: bytes) -> None:
    tolerate_kernel_error(image)


@given(image=st.binary(max_size=1024), magic=st.sampled_from([(0, b"\x7fELF\x02\x01"), (0x202, b"HdrS")]))
def test_no_bytes_behind_a_magic_raise_anything_but_kernel_error(image: bytes, magic: tuple[int, bytes]) -> None:
    offset, word = magic
    tolerate_kernel_error(image[:offset].ljust(offset, b"\0") + word + image[offset + len(word) :])


mutations = st.lists(st.tuples(st.integers(0, 1023), st.binary(min_size=1, max_size=8)), max_size=6)


@given(changes=mutations, cut=st.integers(0, 6000))
def test_no_mutated_bzimage_raises_anything_but_kernel_error(
    bzimage: Build, changes: list[tuple[int, bytes]], cut: int
) -> None:
    tolerate_kernel_error(mutated(bzimage(), changes)[:cut])


@given(
    changes=st.lists(st.tuples(st.integers(0, 420), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.integers(0, 1000),
)
def test_no_mutated_elf_raises_anything_but_kernel_error(
    elf: Build, pvh_note: bytes, changes: list[tuple[int, bytes]], cut: int
) -> None:
    tolerate_kernel_error(mutated(elf(notes=pvh_note), changes)[:cut])


u64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 0x100000, 0xC0000000, 2**32, 2**63, 2**64 - 1])


@given(offset=u64, address=u64, file_size=u64, memory_size=u64)
def test_no_program_header_leads_outside_the_file_or_below_the_tables(
    elf: Build, offset: int, address: int, file_size: int, memory_size: int
) -> None:
    image = bytearray(elf(entry=address))
    struct.pack_into("<Q8xQQQ", image, 64 + 8, offset, address, file_size, memory_size)
    try:
        kernel = inspect_kernel(bytes(image))
    except KernelError:
        return
    assert isinstance(kernel, ElfKernel)
    assert kernel.work_area.start >= 0x100000
    assert kernel.work_area.end <= 0xC0000000
    assert all(len(segment.data) <= segment.memory_size for segment in kernel.segments)


def mutated(image: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(image)
    for offset, word in changes:
        data[offset : offset + len(word)] = word
    return bytes(data)


def tolerate_kernel_error(image: bytes) -> None:
    with suppress(KernelError):
        inspect_kernel(image)
