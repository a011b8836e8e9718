"""An event as one JSON object on one line: the envelope (``v``, ``ts``, ``t_ns``, ``vm``, ``event``), then its details.

The envelope is an interface, like the names; ``schema.json`` beside this file describes every line.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

import orjson

from asyncvmm.events.base import Event

VERSION = 1
"""The ``v`` of every line."""


def to_dict(event: Event, vm_id: str, epoch_ns: int) -> dict[str, object]:
    """The event's JSON object: the envelope, then its details.

    ``epoch_ns`` is the wall clock (ns since 1970, UTC) at the VM's start.
    """
    t_ns = event.t_ns
    record: dict[str, object] = {
        "v": VERSION,
        "ts": timestamp(epoch_ns + t_ns),
        "t_ns": t_ns,
        "vm": vm_id,
        "event": event.event,
    }
    event.tell(record)
    return record


def to_line(event: Event, vm_id: str, epoch_ns: int) -> bytes:
    """The event as one line of JSON, newline included. Does not raise, whatever text the fields hold."""
    record = to_dict(event, vm_id, epoch_ns)
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return orjson.dumps(_sanitised(record), option=orjson.OPT_APPEND_NEWLINE)


def timestamp(wall_ns: int) -> str:
    """RFC 3339 in UTC with microseconds, of nanoseconds since 1970."""
    us = wall_ns // 1000
    return _whole_milliseconds(us // 1000) + _MICROSECONDS[us % 1000]


@lru_cache(maxsize=16)
def _whole_milliseconds(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_whole_seconds(seconds)}.{rest:03d}"


@lru_cache(maxsize=16)
def _whole_seconds(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# Formatting digits costs more than all the rest of a timestamp.
_MICROSECONDS = tuple(f"{number:03d}Z" for number in range(1000))


def _sanitised(value: object) -> object:
    # What JSON cannot hold (lone surrogates of file names, foreign types) becomes text, so that a line always comes.
    if isinstance(value, Mapping):
        return {str(_sanitised(key)): _sanitised(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sanitised(item) for item in value]
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()
