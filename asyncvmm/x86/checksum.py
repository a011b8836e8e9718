"""The one-byte checksum that ACPI and MP tables share: all bytes of a table sum to 0 modulo 256."""

from __future__ import annotations


def checksum(table: bytes) -> int:
    """The byte that makes ``table`` sum to 0, where the checksum's place still holds 0."""
    return -sum(table) & 0xFF


def with_checksum(table: bytes, offset: int) -> bytes:
    """``table`` with its checksum put in at ``offset``, which must hold 0."""
    return table[:offset] + bytes([checksum(table)]) + table[offset + 1 :]
