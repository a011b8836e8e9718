from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.errors import CmdlineError, ConfigError, InitrdError, KernelError, MemorySizeError, VcpuCountError
from asyncvmm.x86.layout import GIB, MIB, mmio_device
from asyncvmm.x86.load import BootLayout, plan_boot

Build = Callable[..., bytes]


def segment_at(layout: BootLayout, address: int) -> bytes:
    return next(bytes(segment.data) for segment in layout.segments if segment.address == address)


def test_a_bzimage_enters_in_long_mode_behind_its_zero_page(bzimage: Build, bzimage_payload: bytes) -> None:
    layout = plan_boot(bzimage(), 5000, "console=ttyS0", 64 * MIB, 2)
    page = segment_at(layout, 0x7000)
    assert layout.protocol == "bzimage"
    assert layout.cpu.rip == 0x100200
    assert segment_at(layout, 0x100000) == bzimage_payload
    assert segment_at(layout, 0x20000) == b"console=ttyS0\0"
    assert struct.unpack_from("<II", page, 0x218) == (layout.initrd_address, 5000)
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    assert page[0x210] == 0xFF
    assert page[0x1E8] == 3
    assert page[0x212:0x218] == bzimage()[0x212:0x218]


def test_an_elf_with_the_note_boots_by_pvh(elf: Build, pvh_note: bytes) -> None:
    layout = plan_boot(elf(notes=pvh_note), 5000, "quiet", 64 * MIB, 1)
    info = segment_at(layout, 0x6000)
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, entries, _ = struct.unpack_from("<IIIIQQQQII", info)
    assert (layout.protocol, layout.cpu.rip) == ("pvh", 0x1000010)
    assert (magic, version, modules, cmdline, rsdp, entries) == (0x336EC578, 1, 1, 0x20000, 0xE0000, 3)
    assert struct.unpack_from("<QQ", info, modlist - 0x6000) == (layout.initrd_address, 5000)
    assert struct.unpack_from("<QQI", info, memmap - 0x6000) == (0, 0x9FC00, 1)


def test_an_elf_without_the_note_boots_by_the_64_bit_protocol(elf: Build) -> None:
    layout = plan_boot(elf(), 0, "", 64 * MIB, 1)
    assert (layout.protocol, layout.cpu.rip, layout.initrd_address) == ("elf64", 0x1000000, None)
    assert segment_at(layout, 0x7000)[0x1FE:0x206] == b"\x55\xaa\0\0HdrS"


def test_the_64_bit_protocol_can_be_asked_for(elf: Build, pvh_note: bytes) -> None:
    assert plan_boot(elf(notes=pvh_note), 0, "", 64 * MIB, 1, prefer_pvh=False).protocol == "elf64"
    with pytest.raises(KernelError, match="ELF entry"):
        plan_boot(elf(notes=pvh_note, entry=0), 0, "", 64 * MIB, 1, prefer_pvh=False)


def test_without_acpi_devices_are_named_on_the_command_line(bzimage: Build) -> None:
    layout = plan_boot(bzimage(), 0, "quiet", 64 * MIB, 1, acpi=False, mmio_devices=[mmio_device(0)])
    assert layout.cmdline == "quiet virtio_mmio.device=4K@0xc0001000:5"
    assert layout.rsdp_address is None
    assert struct.unpack_from("<Q", segment_at(layout, 0x7000), 0x70) == (0,)
    assert [segment.address for segment in layout.segments if 0xE0000 <= segment.address < 0x100000] == [
        0xF0000,
        0xFFFF0,
    ]


def test_the_kernel_is_not_copied(bzimage: Build) -> None:
    image = bytearray(bzimage())
    layout = plan_boot(memoryview(image), 0, "", 64 * MIB, 1)
    image[-1] ^= 0xFF
    assert layout.segments[-1].data[-1] == image[-1]


def test_the_initrd_ends_at_the_top_of_memory_or_where_the_kernel_says(bzimage: Build) -> None:
    assert plan_boot(bzimage(), 4097, "", 64 * MIB, 1).initrd_address == 64 * MIB - 8192
    assert plan_boot(bzimage(initrd_addr_max=0x2FFFFFF), 4096, "", 64 * MIB, 1).initrd_address == 48 * MIB - 4096
    assert plan_boot(bzimage(initrd_addr_max=0xFFFFFFFF), 4096, "", 8 * GIB, 1).initrd_address == 3 * GIB - 4096


def test_an_initrd_that_does_not_fit_is_refused_with_the_room_there_is(bzimage: Build) -> None:
    room = 64 * MIB - 24 * MIB
    assert plan_boot(bzimage(), room, "", 64 * MIB, 1).initrd_address == 24 * MIB
    with pytest.raises(InitrdError) as caught:
        plan_boot(bzimage(), room + 1, "", 64 * MIB, 1)
    assert str(room) in str(caught.value.expected)
    assert caught.value.found == f"{room + 1} bytes"


@pytest.mark.parametrize("memory", [2 * MIB, 24 * MIB - 4096])
def test_memory_too_small_for_the_kernel_is_refused_with_what_it_needs(bzimage: Build, memory: int) -> None:
    with pytest.raises(MemorySizeError) as caught:
        plan_boot(bzimage(), 0, "", memory, 1)
    assert str(24 * MIB) in str(caught.value.expected)


def test_an_elf_s_zeros_count_as_memory_it_needs(elf: Build) -> None:
    image = elf([(0x1000000, b"\xf4" * 64, 64 * MIB)])
    with pytest.raises(MemorySizeError):
        plan_boot(image, 0, "", 64 * MIB, 1)
    with pytest.raises(InitrdError):
        plan_boot(image, 1, "", 80 * MIB, 1)


def test_a_command_line_longer_than_the_kernel_takes_is_refused(bzimage: Build) -> None:
    plan_boot(bzimage(cmdline_size=255), 0, "x" * 255, 64 * MIB, 1)
    with pytest.raises(CmdlineError, match="at most 255 bytes, found 256 bytes"):
        plan_boot(bzimage(cmdline_size=255), 0, "x" * 256, 64 * MIB, 1)
    with pytest.raises(CmdlineError, match="at most 2047 bytes"):
        plan_boot(bzimage(cmdline_size=0xFFFFFFFF), 0, "x" * 2048, 64 * MIB, 1)
    with pytest.raises(CmdlineError, match="NUL"):
        plan_boot(bzimage(), 0, "a\0b", 64 * MIB, 1)


@pytest.mark.parametrize("vcpus", [0, -1, 255])
def test_a_number_of_vcpus_that_cannot_be_is_refused(bzimage: Build, vcpus: int) -> None:
    with pytest.raises(VcpuCountError):
        plan_boot(bzimage(), 0, "", 64 * MIB, vcpus)


@settings(max_examples=60)
@given(
    pages=st.integers(512, 5 * GIB // 4096),
    initrd_size=st.integers(0, 64 * MIB),
    vcpus=st.integers(1, 254),
    devices=st.integers(0, 19),
    kind=st.sampled_from(["bzimage", "pvh", "elf64"]),
    acpi=st.booleans(),
)
def test_nothing_in_a_plan_overlaps_or_leaves_memory(
    bzimage: Build,
    elf: Build,
    pvh_note: bytes,
    pages: int,
    initrd_size: int,
    vcpus: int,
    devices: int,
    kind: str,
    acpi: bool,
) -> None:
    image = bzimage() if kind == "bzimage" else elf(notes=pvh_note if kind == "pvh" else b"")
    places = [mmio_device(slot) for slot in range(devices)]
    try:
        layout = plan_boot(image, initrd_size, "quiet", pages * 4096, vcpus, acpi=acpi, mmio_devices=places)
    except ConfigError:
        return
    ranges = [(segment.address, segment.end) for segment in layout.segments]
    if layout.initrd_address is not None:
        ranges.append((layout.initrd_address, layout.initrd_address + initrd_size))
    ranges.sort()
    assert all(lower[1] <= upper[0] for lower, upper in pairwise(ranges))
    assert ranges[-1][1] <= min(pages * 4096, 3 * GIB)
    assert layout.protocol == kind


def test_the_guest_image_s_kernel_is_planned(default_kernel: memoryview) -> None:
    layout = plan_boot(default_kernel, 16 * MIB, "console=ttyS0", 256 * MIB, 2, mmio_devices=[mmio_device(0)])
    assert layout.protocol in ("bzimage", "pvh", "elf64")
    assert layout.initrd_address is not None
    assert sum(len(segment.data) for segment in layout.segments) > MIB


def test_the_guest_image_s_kernel_cut_short_is_refused(default_kernel: memoryview) -> None:
    with pytest.raises(KernelError):
        plan_boot(default_kernel[: len(default_kernel) // 2], 0, "", 256 * MIB, 1)
