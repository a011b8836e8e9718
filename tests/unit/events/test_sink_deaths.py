"""Readers that stop, go away or have no room; and how often the kernel is asked, which is what a guest pays for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import orjson
import pytest

from asyncvmm.events.hub import EventHub
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.types import Event, GuestHeartbeat, LogLost
from tests.support.lines import VALIDATOR

pytestmark = pytest.mark.anyio

EPOCH_NS = 1_763_692_533_123_456_789
FLOOD = 3000


def beat(number: int) -> GuestHeartbeat:
    return GuestHeartbeat(number, number)


async def publish(sink: JsonLines, first: int, last: int, turn: int = 100) -> None:
    """Heartbeats ``first`` to ``last``, ``turn`` of them in each turn of the loop."""
    for number in range(first, last + 1):
        sink.publish(beat(number))
        if number % turn == 0:
            await asyncio.sleep(0)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "asyncvmm.events")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "asyncvmm.events"]


# -- how often the kernel is asked -------------------------------------------------------------------------------------


class Writes:
    """Counts write(2) by this process; each is done all the same."""

    def __init__(self) -> None:
        self.count = 0
        self._write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        self.count += 1
        return self._write(fd, data)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    counter = Writes()
    monkeypatch.setattr("asyncvmm.events.outputs.os.write", counter)
    return counter


@contextlib.contextmanager
def counted(writes: Writes, expected: int) -> Iterator[None]:
    before = writes.count
    yield
    assert writes.count - before == expected


async def test_a_file_is_written_once_a_turn_and_never_while_events_come(tmp_path: Path, writes: Writes) -> None:
    sink = JsonLines(tmp_path / "boot.jsonl", "a1b2", EPOCH_NS)
    for turn in range(5):
        with counted(writes, 0):
            for number in range(100):
                sink.publish(beat(turn * 100 + number))
        with counted(writes, 1):
            await asyncio.sleep(0)
    with counted(writes, 0):
        await asyncio.sleep(0)
        await sink.aclose()


async def test_a_reader_that_stands_still_is_asked_no_more_often_for_more_events(writes: Writes) -> None:
    reader, writer = os.pipe()
    sink = JsonLines(writer, "a1b2", EPOCH_NS, limit=1 << 16)
    os.close(writer)
    await publish(sink, 1, FLOOD)
    assert sink.lost
    with counted(writes, 0):
        await publish(sink, FLOOD + 1, 2 * FLOOD)
        await asyncio.sleep(0.01)
    os.close(reader)
    await sink.aclose()


async def test_a_dead_reader_is_not_asked_again(writes: Writes) -> None:
    sink = JsonLines("/dev/full", "a1b2", EPOCH_NS)
    with counted(writes, 1):
        await publish(sink, 1, FLOOD)
    assert sink.lost == FLOOD
    await sink.aclose()


# -- deaths ------------------------------------------------------------------------------------------------------------


async def test_a_fifo_whose_reader_goes_away_costs_one_warning(
    tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    await publish(sink, 1, 100)
    assert len(os.read(reader, 1 << 20).splitlines()) == 100
    os.close(reader)
    await publish(sink, 101, 1000)
    await sink.aclose()
    assert sink.lost == 900
    (warning,) = warnings()
    assert f"{path} is gone" in warning
    assert "Broken pipe" in warning


@contextlib.contextmanager
def peer() -> Iterator[tuple[str, Callable[[], socket.socket]]]:
    """A unix socket that listens: its target, and how to accept on it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        server.listen()
        yield f"unix:{folder}/s", lambda: server.accept()[0]


async def test_a_peer_that_stops_reading_is_told_what_it_lost_when_it_reads_on() -> None:
    with peer() as (target, accept):
        sink = JsonLines(target, "a1b2", EPOCH_NS, limit=4096)
        with accept() as client:
            await publish(sink, 1, FLOOD)
            lost = sink.lost
            assert lost > 0
            reading = asyncio.create_task(anyio.to_thread.run_sync(read_to_end, client))
            await sink.aclose(timeout_s=30)
            records = [orjson.loads(line) for line in (await reading).splitlines()]
    told = sum(record["lines"] for record in records if record["event"] == "log.lost")
    heard = [record["counter"] for record in records if record["event"] == "guest.heartbeat"]
    assert (told, len(heard)) == (lost, FLOOD - lost)
    assert heard == sorted(heard)


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize("full", [False, True], ids=["while it reads", "while it is waited for"])
async def test_a_peer_that_dies_costs_one_warning(full: bool, warnings: Callable[[], list[str]]) -> None:
    with peer() as (target, accept):
        sink = JsonLines(target, "a1b2", EPOCH_NS)
        with accept():
            await publish(sink, 1, FLOOD if full else 1)
        await publish(sink, FLOOD + 1, 2 * FLOOD)
        with anyio.fail_after(20):
            await sink.aclose(timeout_s=30)
    assert sink.lost >= FLOOD
    assert len(warnings()) == 1


async def test_a_sink_that_dies_is_no_loss_to_the_others(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    hub, path = EventHub(), tmp_path / "boot.jsonl"

    def broken(data: bytes) -> None:
        raise RuntimeError("boom")

    sinks = [JsonLines(target, "a1b2", EPOCH_NS) for target in (broken, "/dev/full", path)]
    for sink in sinks:
        hub.attach(sink.publish)
    slow, quick = hub.subscribe(capacity=1), hub.subscribe(capacity=1000)
    for number in range(1, 101):
        hub.publish(beat(number))
    await asyncio.sleep(0)
    for number in range(101, 201):
        hub.publish(beat(number))
    hub.close()
    for sink in sinks:
        await sink.aclose()
    assert [sink.lost for sink in sinks] == [200, 200, 0]
    assert len(path.read_bytes().splitlines()) == 200
    assert [event async for event in quick] == [beat(number) for number in range(1, 201)]
    assert [event async for event in slow] == list[Event]([beat(1), LogLost(200, 199)])
    assert len(warnings()) == 2


ON_A_SMALL_DISK = """
import asyncio, sys
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.types import GuestHeartbeat

async def main():
    sink = JsonLines(sys.argv[1] + "/boot.jsonl", "a1b2", 0)
    for number in range(5000):
        sink.publish(GuestHeartbeat(number, number))
        if number % 300 == 0:
            await asyncio.sleep(0)
    await sink.aclose()
    print(sink.lost)
    sys.stdout.write(open(sys.argv[1] + "/boot.jsonl").read())

asyncio.run(main())
"""


@pytest.mark.stalls
@pytest.mark.requires("mount-namespaces")
async def test_a_disk_that_fills_up_keeps_whole_lines_and_costs_one_warning(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    words = ("unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, ON_A_SMALL_DISK)
    done = await anyio.run_process(words, check=False, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.decode().splitlines()
    assert "No space left on device" in warning
    lost, *lines = done.stdout.splitlines()
    records = [orjson.loads(line) for line in lines]
    for record in records:
        VALIDATOR.validate(record)
    assert [record["counter"] for record in records] == list(range(5000 - int(lost)))
    assert int(lost) > 0
