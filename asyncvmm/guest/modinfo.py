"""What a kernel module says of itself: the NUL-separated ``key=value`` strings of its ELF section ``.modinfo``.

Source: the ELF-64 object file format; ``MODULE_INFO`` in include/linux/moduleparam.h of the Linux tree.
"""

from __future__ import annotations

import struct

from asyncvmm.errors import ImageError

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_HEADER_SIZE = 64
_SECTION = struct.Struct("<IIQQQQIIQQ")
"""Elf64_Shdr: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize."""


def parse_modinfo(module: bytes, label: str = "module") -> dict[str, str]:
    """The ``.modinfo`` strings of a module by key (the last one where a key comes twice).

    Raises ImageError if it is no 64-bit little-endian ELF file, or one whose tables leave it.
    """
    if len(module) < _HEADER_SIZE or module[:6] != _ELF64_LITTLE:
        raise ImageError(label, expected="a 64-bit ELF module", found=repr(module[:6]))
    (table,) = struct.unpack_from("<Q", module, 0x28)  # e_shoff
    entry_size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)  # e_shentsize, e_shnum, e_shstrndx
    if entry_size != _SECTION.size or table + count * entry_size > len(module) or names_index >= count:
        raise ImageError(label, expected="a section table inside the file", found=f"{count} entries at {table:#x}")
    sections = [_SECTION.unpack_from(module, table + index * entry_size) for index in range(count)]
    names = _content(module, sections[names_index], label)
    for section in sections:
        if names[section[0] : section[0] + 9] == b".modinfo\0":
            return _strings(_content(module, section, label))
    return {}


def _content(module: bytes, section: tuple[int, ...], label: str) -> bytes:
    offset, size = section[4], section[5]
    if offset + size > len(module):
        raise ImageError(label, expected="sections inside the file", found=f"{size} bytes at {offset:#x}")
    return module[offset : offset + size]


def _strings(content: bytes) -> dict[str, str]:
    pairs = (word.decode("utf-8", "replace").partition("=") for word in content.split(b"\0") if word)
    return {key: value for key, _, value in pairs}
