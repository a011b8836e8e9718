"""Event lines as they come out of a sink, read to the end and counted; and what a sink may leave open."""

from __future__ import annotations

import os
from typing import Any

import anyio
import orjson

from asyncvmm.events.types import GuestHeartbeat
from tests.support.lines import VALIDATOR

EPOCH_NS = 1_763_692_533_123_456_789


def beat(number: int) -> GuestHeartbeat:
    return GuestHeartbeat(number, number)


def records(data: bytes) -> list[dict[str, Any]]:
    """The lines, each checked against the schema; the last must be whole."""
    assert data == b"" or data.endswith(b"\n")
    found = [orjson.loads(line) for line in data.splitlines()]
    for record in found:
        VALIDATOR.validate(record)
    return found


def counters(data: bytes) -> list[int]:
    """The heartbeats in ``data``; a log.lost counts for as many as it says."""
    numbers: list[int] = []
    for record in records(data):
        if record["event"] == "log.lost":
            numbers += range(len(numbers) + 1, len(numbers) + 1 + record["lines"])
        else:
            numbers.append(record["counter"])
    return numbers


async def read_to_end(fd: int) -> bytes:
    return await anyio.to_thread.run_sync(lambda: b"".join(iter(lambda: os.read(fd, 65536), b"")))


def descriptors() -> set[str]:
    """The numbers of those that are open here."""
    # Looked at once the listing's own descriptor is closed.
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}
