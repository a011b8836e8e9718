"""What one event costs: with nobody listening, with a file listening, and what a phase of the timeline costs.

The event is a serial line, the only one that can come by the hundred thousand. Each sample is the mean of many in a
row, loop included; the peer of each is the least that Python can do there.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _bench.bench import Bench
from _bench.figure import Figure, Target
from _bench.turns import take_turns
from asyncvmm.events.hub import EventHub
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.types import SerialLine
from asyncvmm.timing.timeline import Timeline

COUNT = 20_000
"""Operations in one sample."""

EPOCH_NS = 1_763_692_533_123_456_789
PERIOD_NS = 5_000
TEXT = "[    0.734251] pci 0000:00:01.0: [8086:7000] type 00 class"
BATCH = 1000
"""Events in one turn of the loop."""


async def measure(bench: Bench) -> list[Figure]:
    """event_cost of an event that nobody hears, built and not, of one that goes to a file, and of a phase."""
    rounds = bench.rounds(15, 3)
    return [
        _figure("event nobody hears", _asked, _nothing, 1000, rounds),
        _figure("event nobody hears, built and published all the same", _published, _nothing, 1000, rounds),
        await _to_file(rounds),
        _figure("phase of the timeline", _phases, _clocks, 2000, rounds, "two readings of the clock"),
    ]


def _figure(
    case: str, ours: Callable[[], float], peer: Callable[[], float], limit_ns: float, rounds: int, name: str = ""
) -> Figure:
    turns = take_turns(ours, peer, rounds)
    return Figure(
        name="event_cost",
        unit="ns",
        ours=turns.ours,
        peer_name=name or "an empty loop",
        peer=turns.peer,
        target=Target("ours", "<=", limit_ns),
        conditions={"case": case, "per_sample": COUNT},
    )


def _asked() -> float:
    hub = EventHub()
    begin = time.perf_counter_ns()
    for number in range(COUNT):
        if hub.listening:
            hub.publish(SerialLine(number * PERIOD_NS, "console", TEXT))
    return (time.perf_counter_ns() - begin) / COUNT


def _published() -> float:
    hub = EventHub()
    begin = time.perf_counter_ns()
    for number in range(COUNT):
        hub.publish(SerialLine(number * PERIOD_NS, "console", TEXT))
    return (time.perf_counter_ns() - begin) / COUNT


def _nothing() -> float:
    begin = time.perf_counter_ns()
    for _ in range(COUNT):
        pass
    return (time.perf_counter_ns() - begin) / COUNT


def _phases() -> float:
    timeline = Timeline()
    begin = time.perf_counter_ns()
    for _ in range(COUNT):
        with timeline.phase("memory"):
            pass
    return (time.perf_counter_ns() - begin) / COUNT


def _clocks() -> float:
    clock = time.monotonic_ns
    begin = time.perf_counter_ns()
    for _ in range(COUNT):
        clock()
        clock()
    return (time.perf_counter_ns() - begin) / COUNT


async def _to_file(rounds: int) -> Figure:
    with tempfile.TemporaryDirectory(prefix="asyncvmm-bench-") as directory:
        path = Path(directory) / "events.jsonl"
        samples = [await to_file(anew(path), COUNT) for _ in range(rounds + 1)][1:]
    return Figure(
        name="event_cost",
        unit="ns",
        ours=samples,
        target=Target("ours", "<=", 5000),
        conditions={"case": "event to a file, its writing shared", "per_sample": COUNT, "events_a_turn": BATCH},
    )


def anew(path: Path) -> Path:
    """``path``, removed: to empty a file costs what the file system likes, and is not ours to measure."""
    path.unlink(missing_ok=True)
    return path


async def to_file(path: Path, count: int) -> float:
    """Nanoseconds an event takes to get into a new file at ``path``: built, published, written.

    Raises if one is lost.
    """
    begin = time.perf_counter_ns()
    hub = EventHub()
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    hub.attach(sink.publish)
    for first in range(0, count, BATCH):
        for number in range(first, first + BATCH):
            if hub.listening:
                hub.publish(SerialLine(number * PERIOD_NS, "console", TEXT))
        await asyncio.sleep(0)
    await sink.aclose()
    if sink.lost:
        raise AssertionError(f"{sink.lost} events were lost")
    return (time.perf_counter_ns() - begin) / count
