from __future__ import annotations

from collections.abc import Callable

import pytest

from asyncvmm.errors import KernelError
from asyncvmm.x86.bzimage import parse_bzimage
from asyncvmm.x86.layout import Region

Build = Callable[..., bytes]


def test_a_bzimage_is_read_as_its_header_says(bzimage: Build, bzimage_payload: bytes) -> None:
    kernel = parse_bzimage(memoryview(bzimage()))
    assert kernel.version == 0x20F
    assert kernel.payload == bzimage_payload
    assert kernel.load_address == 0x100000
    assert kernel.entry == 0x100200
    assert kernel.work_area == Region(0x1000000, 0x800000)
    assert kernel.initrd_addr_max == 0x7FFFFFFF
    assert kernel.cmdline_size == 2047
    assert kernel.header == bzimage()[0x1F1:0x268]


def test_zero_setup_sectors_mean_four(bzimage: Build) -> None:
    image = bzimage(setup_sects=0, syssize=64)
    assert parse_bzimage(memoryview(image)).payload == image[5 * 512 : 5 * 512 + 1024]


def test_a_signature_behind_the_kernel_is_not_loaded(bzimage: Build, bzimage_payload: bytes) -> None:
    assert parse_bzimage(memoryview(bzimage() + b"signature")).payload == bzimage_payload


def test_a_truncated_bzimage_is_refused_with_both_sizes(bzimage: Build) -> None:
    image = bzimage()
    with pytest.raises(KernelError) as caught:
        parse_bzimage(memoryview(image[:-1]))
    assert str(caught.value) == f"truncated bzImage: expected {len(image)} bytes, found {len(image) - 1} bytes"


def test_a_bzimage_cut_inside_its_header_is_refused(bzimage: Build) -> None:
    with pytest.raises(KernelError, match="truncated"):
        parse_bzimage(memoryview(bzimage()[:0x260]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 0x204}, "found 2.04"),
        ({"boot_flag": 0x55AA}, "boot flag: expected 0xaa55, found 0x55aa"),
        ({"loadflags": 0}, "zImage"),
        ({"xloadflags": 0}, "a 32-bit kernel"),
        ({"syssize": 0}, "found 0 bytes"),
        ({"syssize": 0xFFFFFFFF}, "expected 68719477744 bytes"),
        ({"init_size": 0}, "init_size"),
        ({"init_size": 0xFFFFFFFF}, "init_size"),
        ({"kernel_alignment": 0x300000}, "a power of two, found 0x300000"),
        ({"kernel_alignment": 0}, "a power of two, found 0x0"),
        ({"relocatable": 0, "pref_address": 0x8000}, "pref_address"),
        ({"jump": 0x10EB}, "end of the bzImage setup header"),
        ({"jump": 0xFFEB}, "end of the bzImage setup header"),
    ],
)
def test_a_bad_header_field_is_refused(bzimage: Build, fields: dict[str, int], words: str) -> None:
    with pytest.raises(KernelError) as caught:
        parse_bzimage(memoryview(bzimage(**fields)))
    assert words in str(caught.value)


def test_a_relocatable_kernel_runs_at_its_aligned_load_address_if_it_prefers_less(bzimage: Build) -> None:
    kernel = parse_bzimage(memoryview(bzimage(pref_address=0, kernel_alignment=0x400000)))
    assert kernel.work_area.start == 0x400000
