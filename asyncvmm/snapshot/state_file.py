"""``state.bin``: a snapshot's sections in one file, each behind its name, its size and its CRC-32.

    "AVMMSTA1"  count u32    then for each section    name size u8, name, size u64, CRC-32 u32, data

Numbers are little-endian. The manifest holds the SHA-256 of the whole; the CRC-32 says which section is wrong.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping

from asyncvmm.errors import SnapshotDamaged

MAGIC = b"AVMMSTA1"
MOST_SECTIONS = 255
MOST_SECTION_BYTES = 64 << 20
MOST_STATE_BYTES = 256 << 20

_COUNT = struct.Struct("<I")
_HEAD = struct.Struct("<QI")
_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def pack(sections: Mapping[str, bytes]) -> bytes:
    """The file. Raises ValueError for what would not be read back."""
    parts = [MAGIC, _COUNT.pack(len(sections))]
    for name, data in sections.items():
        encoded = name.encode()
        if not _NAME.fullmatch(encoded) or len(data) > MOST_SECTION_BYTES:
            raise ValueError(f"no section: {name[:80]!r} of {len(data)} bytes")
        parts += bytes([len(encoded)]), encoded, _HEAD.pack(len(data), zlib.crc32(data)), data
    size = sum(map(len, parts))
    if len(sections) > MOST_SECTIONS or size > MOST_STATE_BYTES:
        raise ValueError(f"{len(sections)} sections of {size} bytes together")
    return b"".join(parts)


def unpack(data: bytes) -> dict[str, bytes]:
    """The sections of a file that holds ``data``. Raises SnapshotDamaged."""
    reader = _Reader(data)
    if (magic := reader.take(len(MAGIC), "its first bytes")) != MAGIC:
        raise SnapshotDamaged("state file", expected=MAGIC.decode(), found=magic.hex())
    (count,) = _COUNT.unpack(reader.take(_COUNT.size, "the number of sections"))
    if count > MOST_SECTIONS:
        raise SnapshotDamaged("state file", expected=f"at most {MOST_SECTIONS} sections", found=count)
    sections: dict[str, bytes] = {}
    for _ in range(count):
        name, section = _section(reader)
        if name in sections:
            raise SnapshotDamaged("state file", expected="each section once", found=f"{name} twice")
        sections[name] = section
    if reader.left:
        raise SnapshotDamaged("state file", expected="its end", found=f"{reader.left} bytes more")
    return sections


def _section(reader: _Reader) -> tuple[str, bytes]:
    name = reader.take(reader.take(1, "a name's size")[0], "a name")
    if not _NAME.fullmatch(name):
        raise SnapshotDamaged("state file", expected="a section's name", found=name.hex()[:80])
    text = name.decode()
    size, checksum = _HEAD.unpack(reader.take(_HEAD.size, f"the size of {text}"))
    if size > MOST_SECTION_BYTES:
        raise SnapshotDamaged(f"section {text}", expected=f"at most {MOST_SECTION_BYTES} bytes", found=size)
    data = reader.take(size, f"section {text}")
    if (found := zlib.crc32(data)) != checksum:
        raise SnapshotDamaged(f"section {text}", expected=f"CRC-32 {checksum:08x}", found=f"{found:08x}")
    return text, data


class _Reader:
    """Bytes, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise SnapshotDamaged(f"state file, {what}", expected=f"{size} bytes", found=f"{self.left} bytes left")
        self._at += size
        return self._data[self._at - size : self._at]
