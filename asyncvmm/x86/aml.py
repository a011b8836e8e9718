"""Encodes the little AML that our DSDT needs. Each function returns the bytes of one term.

Facts: ACPI 6.5, chapter 20 (AML) and 6.4 (resource data types).
"""

from __future__ import annotations

import struct

_NAME_START = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_NAME_CHARS = _NAME_START | frozenset("0123456789")

SYSTEM_IO = 0x01
_FIELD_BYTE_ACCESS = 0x01
LOCAL0 = b"\x60"

_MAX_ONE_BYTE_LENGTH = 0x3F


def name_path(path: str) -> bytes:
    r"""A NameString: ``_SB_``, ``\_S5_``, ``\_SB_.PWRB``. Segments are four characters."""
    root = b"\\" if path.startswith("\\") else b""
    segments = path.removeprefix("\\").split(".")
    for segment in segments:
        if len(segment) != 4 or segment[0] not in _NAME_START or not _NAME_CHARS.issuperset(segment):
            raise ValueError(f"not an AML name segment: {segment!r}")
    prefix = {1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return root + prefix + "".join(segments).encode("ascii")


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return bytes([value])
    for prefix, form, limit in ((0x0A, "B", 8), (0x0B, "H", 16), (0x0C, "I", 32), (0x0E, "Q", 64)):
        if 0 <= value < 1 << limit:
            return bytes([prefix]) + struct.pack(f"<{form}", value)
    raise ValueError(f"not a 64-bit integer: {value:#x}")


def string(text: str) -> bytes:
    """A String term; ASCII."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A DWord with a compressed EISA ID such as ``PNP0501`` (ACPI 6.5, 19.6.38)."""
    vendor, product = text[:3], int(text[3:], 16)
    first, second, third = (ord(letter) - 0x40 for letter in vendor)
    compressed = first << 10 | second << 5 | third
    return b"\x0c" + struct.pack(">HH", compressed, product)


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return b"\x08" + name_path(path) + value


def package(*elements: bytes) -> bytes:
    """Package () {elements}."""
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    return b"\x10" + _sized(name_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    return b"\x5b\x82" + _sized(name_path(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method (path, arguments, [Not]Serialized) {terms}."""
    flags = bytes([arguments | (0x08 if serialized else 0)])
    return b"\x14" + _sized(name_path(path) + flags + b"".join(terms))


def system_io_field(region: str, port: int, field: str) -> bytes:
    """An operation region of one I/O port, and a field of one byte over it."""
    operation_region = b"\x5b\x80" + name_path(region) + bytes([SYSTEM_IO]) + integer(port) + integer(1)
    # A field's list is a name and its width in bits, as a package length.
    fields = name_path(region) + bytes([_FIELD_BYTE_ACCESS]) + name_path(field) + b"\x08"
    return operation_region + b"\x5b\x81" + _sized(fields)


def store(source: bytes, target: bytes) -> bytes:
    """Store (source, target)."""
    return b"\x70" + source + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """And (left, right), its result not stored."""
    return b"\x7b" + left + right + b"\0"


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return b"\xa4" + value


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """If (predicate) {terms}."""
    return b"\xa0" + _sized(predicate + b"".join(terms))


def notify(target: str, value: int) -> bytes:
    """Notify (target, value)."""
    return b"\x86" + name_path(target) + integer(value)


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}: a buffer with the end tag behind them (checksum 0: not checked)."""
    content = b"".join(descriptors) + b"\x79\0"
    return b"\x11" + _sized(integer(len(content)) + content)


def io_ports(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 0x01, base, base, 1, length)


def memory32_fixed(address: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, address, length)."""
    return struct.pack("<BHBII", 0x86, 9, 0x01, address, length)


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


def _sized(content: bytes) -> bytes:
    """``content`` behind its PkgLength, which counts itself (ACPI 6.5, 20.2.4)."""
    if len(content) + 1 <= _MAX_ONE_BYTE_LENGTH:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        total = len(content) + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"AML package of {len(content)} bytes")
