"""How many events a second go into a file, one write a loop turn, beside plain orjson and write.

Ours is all of it: the event is built, goes through the hub, becomes a line, is written. The floor holds the same values
in its hands and writes the same bytes: it makes the dict, time stamp included, because the line says it and no program
gets it for nothing. The target is held against that floor. A second floor is handed the dicts ready-made, which no
program has; no Python that gets values and not dicts can come within twice of it, so it is shown and not a target.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from _bench.bench import Bench
from _bench.events import BATCH, EPOCH_NS, PERIOD_NS, TEXT, anew, to_file
from _bench.figure import Figure, Target
from _bench.turns import Turns
from asyncvmm.events.encoding import timestamp

PIECE = 50_000
"""Events in one sample."""

SECONDS = 4.0
RATE = 200_000

Batch = Callable[[int], Iterable[dict[str, Any]]]


async def measure(bench: Bench) -> list[Figure]:
    """event_stream: the time of one event beside both floors, and the rate that is kept up for some seconds."""
    with tempfile.TemporaryDirectory(prefix="asyncvmm-bench-") as directory:
        path = Path(directory) / "events.jsonl"
        made, ready = await _take_turns(path, bench.rounds(15, 3))
        rate = await _sustained(path, SECONDS if not bench.quick else SECONDS / 4)
        return [
            _beside(
                "orjson.dumps of a dict made of the same values, one write a batch", made, Target("ratio", "<=", 2)
            ),
            _beside("orjson.dumps of ready-made dicts, one write a batch", ready, None),
            rate,
        ]


async def _take_turns(path: Path, rounds: int) -> tuple[Turns, Turns]:
    ready = [_dict_of(number) for number in range(BATCH)]
    made, given = Turns(), Turns()
    for number in range(rounds + 1):
        ours = await to_file(anew(path), PIECE)
        floors = (
            _floor(anew(path), lambda first: map(_dict_of, range(first, first + BATCH))),
            _floor(anew(path), lambda _: ready),
        )
        if number:
            for turns, floor in zip((made, given), floors, strict=True):
                turns.ours.append(ours)
                turns.peer.append(floor)
    return made, given


def _beside(floor: str, turns: Turns, target: Target | None) -> Figure:
    return Figure(
        name="event_stream",
        unit="ns",
        ours=turns.ours,
        peer_name=floor,
        peer=turns.peer,
        target=target,
        conditions={"case": "one event", "events_a_turn": BATCH, "per_sample": PIECE},
    )


async def _sustained(path: Path, seconds: float) -> Figure:
    """As fast as it goes, in pieces until the time is over; each into a new file."""
    begin = time.monotonic()
    rates = []
    while time.monotonic() - begin < seconds:
        rates.append(1e9 / await to_file(anew(path), PIECE))
    return Figure(
        name="event_stream",
        unit="1/s",
        ours=rates,
        target=Target("ours", ">=", RATE),
        conditions={"case": "as fast as it goes", "events_a_turn": BATCH, "seconds": seconds},
        detail={"lost": 0, "slowest_piece": round(min(rates))},
    )


def _dict_of(number: int) -> dict[str, Any]:
    t_ns = number * PERIOD_NS
    return {
        "v": 1,
        "ts": timestamp(EPOCH_NS + t_ns),
        "t_ns": t_ns,
        "vm": "a1b2",
        "event": "serial.line",
        "port": "console",
        "text": TEXT,
        "truncated": False,
    }


def _floor(path: Path, batch: Batch) -> float:
    """Nanoseconds an event takes."""
    begin = time.perf_counter_ns()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for first in range(0, PIECE, BATCH):
            data = bytearray()
            for record in batch(first):
                data += orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
            os.write(fd, data)
    finally:
        os.close(fd)
    return (time.perf_counter_ns() - begin) / PIECE
