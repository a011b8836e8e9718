"""PVH's start_info, module list and memory map.

Facts: Xen's x86 PVH boot ABI (struct hvm_start_info version 1, hvm_modlist_entry, hvm_memmap_table_entry).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from asyncvmm.x86.layout import PVH_MEMMAP, PVH_MODLIST, PVH_START_INFO, E820Entry

_MAGIC = 0x336EC578
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODLIST_ENTRY = struct.Struct("<QQQQ")
_MEMMAP_ENTRY = struct.Struct("<QQII")


def start_info(
    *,
    cmdline_address: int,
    memmap: Sequence[E820Entry],
    rsdp_address: int = 0,
    ramdisk_address: int = 0,
    ramdisk_size: int = 0,
) -> bytes:
    """start_info with its module list and memory map behind it, to stand at PVH_START_INFO. A size of 0 means no
    ramdisk."""
    modules = [_MODLIST_ENTRY.pack(ramdisk_address, ramdisk_size, 0, 0)] if ramdisk_size else []
    info = _START_INFO.pack(
        _MAGIC,
        1,
        0,
        len(modules),
        PVH_MODLIST if modules else 0,
        cmdline_address,
        rsdp_address,
        PVH_MEMMAP,
        len(memmap),
        0,
    )
    entries = b"".join(_MEMMAP_ENTRY.pack(entry.start, entry.size, entry.type, 0) for entry in memmap)
    head = info.ljust(PVH_MODLIST - PVH_START_INFO, b"\0") + b"".join(modules)
    return head.ljust(PVH_MEMMAP - PVH_START_INFO, b"\0") + entries
