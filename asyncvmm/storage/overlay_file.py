"""The file of an overlay: a header, the map of its own blocks, and behind them the disk, sparse.

    0        header, one page: what is in ``_HEADER``, the base's path, and a CRC-32 in the last four bytes
    4096     the map, one byte a block (block_map.py)
    data_at  the disk's bytes, each at its own offset; what the map does not have is a hole

The header's size and time of change of the base are compared when the overlay is opened again: another base underneath
it would make nonsense of both. The guest sees and writes what is behind ``data_at`` alone.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Final

import attrs

from asyncvmm.errors import ImageError
from asyncvmm.storage.block_map import LEAST_BLOCK, MOST_BLOCKS, block_size_for, map_bytes
from asyncvmm.storage.image import whole_sectors

MAGIC: Final = b"asyncvmm-overlay"
VERSION: Final = 1
MAP_AT: Final = 4096
_HEADER = struct.Struct("<16sIIQQQI")
_CRC = struct.Struct("<I")
_MOST_PATH: Final = MAP_AT - _HEADER.size - _CRC.size
_UNKNOWN: Final = "an overlay's header"


@attrs.frozen(kw_only=True)
class OverlayHeader:
    """What the header says. size, mtime_ns: of the base. block: bytes. base: the path of the base, resolved."""

    size: int
    mtime_ns: int
    block: int
    base: bytes

    @property
    def data_at(self) -> int:
        """Where the disk begins in the file."""
        return MAP_AT + map_bytes(self.size, self.block)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.data_at + whole_sectors(self.size)

    def pack(self) -> bytes:
        """The header's page. Raises ImageError for a path that is too long."""
        if len(self.base) > _MOST_PATH:
            raise ImageError("overlay", expected=f"a path of at most {_MOST_PATH} bytes", found=len(self.base))
        fields = (MAGIC, VERSION, self.block, self.size, self.mtime_ns, self.data_at, len(self.base))
        page = (_HEADER.pack(*fields) + self.base).ljust(MAP_AT - _CRC.size, b"\0")
        return page + _CRC.pack(zlib.crc32(page))


def header_for(base: Path, size: int) -> OverlayHeader:
    """The header of a new overlay of ``base``, which has ``size`` bytes."""
    name = os.fsencode(os.path.realpath(base))
    return OverlayHeader(size=size, mtime_ns=_changed_ns(base), block=block_size_for(size), base=name)


def _changed_ns(base: Path) -> int:
    """When a file was changed the last time; 0 for a device, whose node does not know."""
    return base.stat().st_mtime_ns if base.is_file() else 0


def parse_header(page: bytes) -> OverlayHeader:
    """Raises ImageError for anything that ``pack`` did not make."""
    if len(page) != MAP_AT or not page.startswith(MAGIC):
        raise ImageError("overlay", expected=_UNKNOWN, found=repr(page[:16]))
    if zlib.crc32(page[: -_CRC.size]) != _CRC.unpack(page[-_CRC.size :])[0]:
        raise ImageError("overlay", expected=_UNKNOWN, found="a wrong checksum")
    _, version, block, size, mtime_ns, data_at, length = _HEADER.unpack_from(page)
    if version != VERSION:
        raise ImageError("overlay", expected=f"version {VERSION}", found=version)
    if block < LEAST_BLOCK or block & (block - 1) or not 0 < size <= block * MOST_BLOCKS or length > _MOST_PATH:
        raise ImageError("overlay", expected=_UNKNOWN, found=f"{size} bytes in blocks of {block}")
    base = page[_HEADER.size : _HEADER.size + length]
    header = OverlayHeader(size=size, mtime_ns=mtime_ns, block=block, base=base)
    if data_at != header.data_at:
        raise ImageError("overlay", expected=f"data at {header.data_at}", found=data_at)
    return header


def check_header(header: OverlayHeader, expected: OverlayHeader, path: Path, file_size: int) -> None:
    """Raises ImageError unless it is an overlay of that base, as the base is now, and whole."""
    if header != expected:
        raise ImageError("overlay", expected=_facts(expected), found=f"{path}, of {_facts(header)}")
    if file_size < header.file_size:
        raise ImageError("overlay", expected=f"{header.file_size} bytes", found=f"{path} of {file_size}")


def _facts(header: OverlayHeader) -> str:
    return f"{os.fsdecode(header.base)} ({header.size} bytes, changed {header.mtime_ns})"
