"""Reads a bzImage's setup header and checks each field against the file.

Facts: Linux Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit BOOT PROTOCOL").
"""

from __future__ import annotations

import struct

import attrs

from asyncvmm.errors import KernelError
from asyncvmm.x86.layout import KERNEL_ADDRESS, Region

HEADER_START = 0x1F1
HEADER_MIN_END = 0x268
"""End of protocol 2.12's last field."""
HEADER_MAX_END = 0x290
"""The zero page has other things from here on."""
SECTOR = 512
MIN_VERSION = 0x20C
ENTRY_64_OFFSET = 0x200
LOADED_HIGH = 0x01
XLF_KERNEL_64 = 0x01
MAX_INIT_SIZE = 1 << 30


@attrs.frozen(kw_only=True)
class BzImage:
    """A checked bzImage. ``header`` is the setup header as it stands in the file from HEADER_START on; ``payload``
    the protected-mode part, loaded at ``load_address`` and entered at ``entry``; ``work_area`` what the kernel
    needs to unpack itself and run until it reads the memory map; ``cmdline_size`` excludes the NUL."""

    version: int
    header: bytes
    payload: memoryview = attrs.field(repr=False)
    load_address: int
    work_area: Region
    initrd_addr_max: int
    cmdline_size: int

    @property
    def entry(self) -> int:
        """Physical address of the 64-bit entry point."""
        return self.load_address + ENTRY_64_OFFSET


def is_bzimage(image: memoryview) -> bool:
    """Whether the setup header's signature is there."""
    return bytes(image[0x202:0x206]) == b"HdrS"


def parse_bzimage(image: memoryview) -> BzImage:
    """The bzImage in ``image``, the whole file. Raises KernelError with what was expected and found."""
    header = _header(image)
    version = _u16(header, 0x206)
    _check_flags(header)
    payload = _payload(image, header)
    return BzImage(
        version=version,
        header=header,
        payload=payload,
        load_address=KERNEL_ADDRESS,
        work_area=_work_area(header, len(payload)),
        initrd_addr_max=_u32(header, 0x22C),
        cmdline_size=_u32(header, 0x238),
    )


def _header(image: memoryview) -> bytes:
    if len(image) < HEADER_MIN_END:
        raise KernelError("truncated bzImage", expected=f"at least {HEADER_MIN_END} bytes", found=f"{len(image)} bytes")
    version: int = struct.unpack_from("<H", image, 0x206)[0]
    if version < MIN_VERSION:
        found = f"{version >> 8}.{version & 0xFF:02d}"
        raise KernelError("bzImage boot protocol", expected="2.12 or later", found=found)
    end = 0x202 + image[0x201]
    if not HEADER_MIN_END <= end <= HEADER_MAX_END:
        expected = f"{HEADER_MIN_END:#x} to {HEADER_MAX_END:#x}"
        raise KernelError("end of the bzImage setup header", expected=expected, found=f"{end:#x}")
    if len(image) < end:
        raise KernelError("truncated bzImage", expected=f"at least {end} bytes", found=f"{len(image)} bytes")
    return bytes(image[HEADER_START:end])


def _check_flags(header: bytes) -> None:
    boot_flag = _u16(header, 0x1FE)
    if boot_flag != 0xAA55:
        raise KernelError("bzImage boot flag", expected="0xaa55", found=f"{boot_flag:#06x}")
    if not header[0x211 - HEADER_START] & LOADED_HIGH:
        raise KernelError("bzImage load flags", expected="LOADED_HIGH set", found="a zImage, to be loaded low")
    if not _u16(header, 0x236) & XLF_KERNEL_64:
        raise KernelError("bzImage", expected="a 64-bit kernel (XLF_KERNEL_64)", found="a 32-bit kernel")


def _payload(image: memoryview, header: bytes) -> memoryview:
    start = ((header[0] or 4) + 1) * SECTOR
    size = _u32(header, 0x1F4) * 16
    if size <= ENTRY_64_OFFSET:
        expected = f"more than {ENTRY_64_OFFSET} bytes"
        raise KernelError("bzImage protected-mode part (syssize)", expected=expected, found=f"{size} bytes")
    if len(image) < start + size:
        raise KernelError("truncated bzImage", expected=f"{start + size} bytes", found=f"{len(image)} bytes")
    return image[start : start + size]


def _work_area(header: bytes, payload_size: int) -> Region:
    alignment = _u32(header, 0x230)
    preferred = _u64(header, 0x258)
    init_size = _u32(header, 0x260)
    if not payload_size <= init_size <= MAX_INIT_SIZE:
        expected = f"{payload_size} to {MAX_INIT_SIZE} bytes"
        raise KernelError("bzImage init_size", expected=expected, found=f"{init_size} bytes")
    start = preferred
    if header[0x234 - HEADER_START]:
        if alignment == 0 or alignment & (alignment - 1):
            raise KernelError("bzImage kernel_alignment", expected="a power of two", found=f"{alignment:#x}")
        start = max(preferred, -(-KERNEL_ADDRESS // alignment) * alignment)
    if start < KERNEL_ADDRESS:
        expected = f"at or above {KERNEL_ADDRESS:#x}"
        raise KernelError("bzImage pref_address", expected=expected, found=f"{start:#x}")
    return Region(start, init_size)


def _u16(header: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<H", header, offset - HEADER_START)[0]
    return value


def _u32(header: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<I", header, offset - HEADER_START)[0]
    return value


def _u64(header: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<Q", header, offset - HEADER_START)[0]
    return value
