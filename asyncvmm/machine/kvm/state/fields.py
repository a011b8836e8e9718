"""Reading a saved record: every value is wrong until checked."""

from __future__ import annotations

from typing import Any

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.codec import decode

U64_MOST = (1 << 64) - 1


class Fields:
    """A decoded section's fields. Every method raises SnapshotDamaged, naming the section and the field."""

    def __init__(self, section: str, record: object) -> None:
        if not isinstance(record, dict):
            raise SnapshotDamaged(section, expected="a record", found=type(record).__name__)
        self._section = section
        self._record: dict[Any, Any] = record

    @classmethod
    def of(cls, section: str, data: bytes) -> Fields:
        """Of an encoded section."""
        return cls(section, decode(data))

    def refuse(self, name: str, expected: str, found: object) -> SnapshotDamaged:
        """What to raise for a field that is wrong."""
        return SnapshotDamaged(f"{self._section}: {name}", expected=expected, found=f"{found}"[:80])

    def value(self, name: str) -> object:
        """Whatever is there."""
        if name not in self._record:
            raise self.refuse(name, "a value", "none")
        return self._record[name]

    def fields(self, name: str) -> Fields:
        """A record."""
        return Fields(f"{self._section}: {name}", self.value(name))

    def integer(self, name: str, most: int = U64_MOST, least: int = 0) -> int:
        """An integer within bounds."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(name, f"an integer from {least:#x} to {most:#x}", repr(value))
        return value

    def integer_or_none(self, name: str) -> int | None:
        """An integer of 64 bits, or None."""
        return None if self.value(name) is None else self.integer(name)

    def content(self, name: str, least: int, most: int, unit: int = 1) -> bytes:
        """Bytes, a multiple of ``unit`` of them."""
        value = self.value(name)
        if not isinstance(value, bytes):
            raise self.refuse(name, "bytes", type(value).__name__)
        if not least <= len(value) <= most or len(value) % unit:
            wanted = f"{least}" if least == most else f"{least} to {most}, in units of {unit}"
            raise self.refuse(name, f"{wanted} bytes", f"{len(value)} bytes")
        return value

    def exactly(self, name: str, size: int) -> bytes:
        """That many bytes."""
        return self.content(name, size, size)

    def exactly_or_none(self, name: str, size: int) -> bytes | None:
        """That many bytes, or None."""
        return None if self.value(name) is None else self.exactly(name, size)

    def entries(self, name: str, most: int) -> list[object]:
        """A list, not too long."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(name, f"a list of at most {most}", repr(value))
        return value

    def integers(self, name: str, most_entries: int, most: int = U64_MOST) -> list[int]:
        """A list of integers from 0 to ``most``."""
        found: list[int] = []
        for entry in self.entries(name, most_entries):
            if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry <= most:
                raise self.refuse(name, f"integers from 0 to {most:#x}", repr(entry))
            found.append(entry)
        return found
