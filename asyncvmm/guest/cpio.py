"""The "newc" cpio archive, as the kernel's initramfs takes it: written so that equal content gives equal bytes.

Entries are sorted by name, parents are added, times and owners are 0, inode numbers count up. Source:
Documentation/driver-api/early-userspace/buffer-format.rst in the Linux tree.
"""

from __future__ import annotations

import stat
import struct
from binascii import unhexlify
from collections.abc import Iterable

import attrs

MAGIC = b"070701"
HEADER_SIZE = 110
TRAILER = "TRAILER!!!"
MAX_NAME = 4096
MAX_FILE = 0xFFFFFFFF

_FIELDS = struct.Struct(">13I")


class CpioError(ValueError):
    """Bytes that are no newc archive, or entries that cannot be one."""


@attrs.frozen
class Entry:
    """One file: ``name`` relative to the root, ``mode`` with its type bits, ``rdev`` a device's major and minor."""

    name: str
    mode: int
    data: bytes = attrs.field(default=b"", repr=lambda data: f"<{len(data)} bytes>")
    rdev: tuple[int, int] = (0, 0)


def directory(name: str, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to ``target``."""
    return Entry(name, stat.S_IFLNK | 0o777, _encode(target))


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | permissions, rdev=(major, minor))


def write(entries: Iterable[Entry], *, align: int = 512) -> bytes:
    """The archive of these entries, padded with zeros to a multiple of ``align`` (itself a multiple of 4).

    Raises CpioError for a name that is absolute, empty, has ``..`` in it, or comes twice, and for data of 4 GiB.
    """
    archive = bytearray()
    for inode, entry in enumerate(_in_order(entries), start=1):
        _append(archive, inode, entry)
    _append(archive, 0, Entry(TRAILER, 0))
    archive += bytes(-len(archive) % align)
    return bytes(archive)


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    by_name: dict[str, Entry] = {}
    for entry in entries:
        _check(entry)
        if entry.name in by_name:
            raise CpioError(f"{entry.name} comes twice")
        by_name[entry.name] = entry
    for name in list(by_name):
        for parent in _parents(name):
            by_name.setdefault(parent, directory(parent))
    return [by_name[name] for name in sorted(by_name)]


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _check(entry: Entry) -> None:
    parts = entry.name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in entry.name or entry.name == TRAILER:
        raise CpioError(f"not a name for an archive: {entry.name!r}")
    if len(_encode(entry.name)) >= MAX_NAME:
        raise CpioError(f"name longer than {MAX_NAME - 1} bytes: {entry.name[:40]!r}…")
    if len(entry.data) > MAX_FILE:
        raise CpioError(f"{entry.name} has {len(entry.data)} bytes, at most {MAX_FILE} fit")


def _append(archive: bytearray, inode: int, entry: Entry) -> None:
    name = _encode(entry.name) + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.rdev, len(name), 0)
    archive += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    archive += bytes(-len(archive) % 4) + entry.data
    archive += bytes(-len(archive) % 4)


def read(archive: bytes, *, max_entries: int = 65536) -> list[Entry]:
    """The entries of an archive, or of several one behind the other. Raises CpioError."""
    entries: list[Entry] = []
    offset = 0
    while offset < len(archive):
        if archive[offset] == 0:
            offset += 1
            continue
        entry, offset = _read_entry(archive, offset)
        if entry.name != TRAILER:
            entries.append(entry)
        if len(entries) > max_entries:
            raise CpioError(f"more than {max_entries} entries")
    return entries


def _read_entry(archive: bytes, offset: int) -> tuple[Entry, int]:
    header = archive[offset : offset + HEADER_SIZE]
    if len(header) < HEADER_SIZE or header[:6] != MAGIC:
        raise CpioError(f"no newc header at byte {offset}")
    try:
        fields = _FIELDS.unpack(unhexlify(header[6:]))  # int() would take a sign
    except ValueError:
        raise CpioError(f"a field of the header at byte {offset} is not hexadecimal") from None
    mode, size, rdev, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
    start = _aligned(offset + HEADER_SIZE + name_size)
    if not 1 < name_size <= MAX_NAME or start + size > len(archive):
        raise CpioError(f"the entry at byte {offset} leaves the archive")
    name = archive[offset + HEADER_SIZE : offset + HEADER_SIZE + name_size - 1]
    entry = Entry(name.decode("utf-8", "surrogateescape"), mode, archive[start : start + size], rdev)
    return entry, _aligned(start + size)


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
