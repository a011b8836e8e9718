"""Records: events as plain mappings, the one form from which everything is exported.

A record is a line's JSON object, or the same of an event that is at hand. Lines come from files that anybody may have
written: what is read from them is checked here. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from asyncvmm.events.types import Event

MAX_LINE = 1 << 20
"""Bytes of a line beyond which it is none of ours."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What other programs put before a file's first line to say that it is UTF-8."""

MAX_NAME = 1024
"""Characters of a VM's name beyond which it is none of ours."""

LARGEST = (1 << 63) - 1
"""No count and no nanoseconds of the host's come near it."""

LARGEST_GUEST_NS = (1 << 64) - 1
"""A guest may say whatever BOOT_TIME has room for."""

Record = Mapping[str, object]


class NotARecord(ValueError):
    """A line or a field that is not as asyncvmm writes it; says in a few words what was found, never the text."""


def read_record(line: bytes) -> Record:
    """The record of one JSON line. Raises NotARecord if it is not an event of asyncvmm, version 1."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise NotARecord("not JSON") from None
    if not isinstance(record, dict) or not {"v", "t_ns", "vm", "event"} <= record.keys():
        raise NotARecord("not an event of asyncvmm")
    if record["v"] != 1 or isinstance(record["v"], bool):
        raise NotARecord("an event of another version")
    if len(text(record, "vm")) > MAX_NAME:
        raise NotARecord("vm is too long")
    text(record, "event")
    number(record, "t_ns")
    return record


def record_of(event: Event) -> Record:
    """The record of an event, without what only its line has: ``v``, ``ts`` and ``vm``."""
    return {"event": event.event, "t_ns": event.t_ns, **event.details()}


def text(record: Record, name: str) -> str:
    """A field that must be text. Raises NotARecord."""
    value = record.get(name)
    if not isinstance(value, str):
        raise NotARecord(f"{name} is not text")
    return value


def number(record: Record, name: str, most: int = LARGEST) -> int:
    """A field that must be a whole number from 0 to ``most``. Raises NotARecord."""
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise NotARecord(f"{name} is not a number, or out of range")
    return value


def counts(record: Record, name: str) -> dict[str, int]:
    """A field that maps words to counts; empty if it is not there. Raises NotARecord."""
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise NotARecord(f"{name} is not a table of counts")
    return {key: number(value, key) for key in value}
