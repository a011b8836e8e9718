"""The zero page (struct boot_params) for the 64-bit boot protocol.

Facts: Linux Documentation/arch/x86/zero-page.rst and boot.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs

from asyncvmm.x86.bzimage import HEADER_MIN_END, HEADER_START, LOADED_HIGH
from asyncvmm.x86.layout import PAGE_SIZE, E820Entry

_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_BOOT_FLAG = 0x1FE
_MAGIC = 0x202
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_RAMDISK = 0x218
_CMD_LINE_PTR = 0x228
_KERNEL_ALIGNMENT = 0x230
_CMDLINE_SIZE = 0x238
_E820_TABLE = 0x2D0
_E820_ENTRY = struct.Struct("<QQI")

_VID_MODE_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF
_VMLINUX_ALIGNMENT = 16 << 20


@attrs.frozen(kw_only=True)
class BootParams:
    """What the zero page says: addresses and sizes in bytes, 0 where there is none."""

    cmdline_address: int
    cmdline_size: int
    e820: Sequence[E820Entry]
    ramdisk_address: int = 0
    ramdisk_size: int = 0
    rsdp_address: int = 0


def zero_page(params: BootParams, header: bytes | None) -> bytes:
    """The page, with a bzImage's setup ``header`` (from 0x1f1 on) in it; None for an ELF, which has none."""
    page = bytearray(PAGE_SIZE)
    header = header or _vmlinux_header(params.cmdline_size)
    page[HEADER_START : HEADER_START + len(header)] = header
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[_LOADFLAGS] |= LOADED_HIGH
    struct.pack_into("<H", page, _VID_MODE, _VID_MODE_NORMAL)
    struct.pack_into("<II", page, _RAMDISK, params.ramdisk_address, params.ramdisk_size)
    struct.pack_into("<I", page, _CMD_LINE_PTR, params.cmdline_address)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, params.rsdp_address)
    _put_e820(page, params.e820)
    return bytes(page)


def _put_e820(page: bytearray, entries: Sequence[E820Entry]) -> None:
    page[_E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        offset = _E820_TABLE + index * _E820_ENTRY.size
        _E820_ENTRY.pack_into(page, offset, entry.start, entry.size, entry.type)


def _vmlinux_header(cmdline_size: int) -> bytes:
    page = bytearray(HEADER_MIN_END)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    struct.pack_into("<4sH", page, _MAGIC, b"HdrS", 0x20C)
    struct.pack_into("<I", page, _KERNEL_ALIGNMENT, _VMLINUX_ALIGNMENT)
    struct.pack_into("<I", page, _CMDLINE_SIZE, cmdline_size)
    return bytes(page[HEADER_START:])
