from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from pathlib import Path

import anyio
import pytest

from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.types import SerialLine
from tests.support.line_readers import EPOCH_NS, beat, counters, descriptors, read_to_end, records

pytestmark = pytest.mark.anyio


@pytest.mark.stalls
async def test_a_file_is_emptied_and_gets_every_line(tmp_path: Path) -> None:
    path = tmp_path / "boot.jsonl"
    path.write_text("from the last run\n" * 100)
    before = descriptors()
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    for number in range(1, 1001):
        sink.publish(beat(number))
    await sink.aclose()
    assert counters(path.read_bytes()) == list(range(1, 1001))
    assert sink.lost == 0
    assert descriptors() == before


async def test_there_is_one_write_a_loop_turn() -> None:
    batches: list[bytes] = []
    sink = JsonLines(batches.append, "a1b2", EPOCH_NS)
    for number in range(1, 4):
        sink.publish(beat(number))
    assert batches == []
    await asyncio.sleep(0)
    sink.publish(beat(4))
    await asyncio.sleep(0)
    assert [counters(batch) for batch in batches] == [[1, 2, 3], [4]]
    await sink.aclose()


@pytest.mark.stalls
async def test_a_slow_pipe_gets_everything_and_its_flags_stay(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    before = descriptors()
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    await asyncio.sleep(0.01)
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags
    os.close(writer)
    before.discard(str(writer))
    task = asyncio.create_task(read_to_end(reader))
    await sink.aclose(timeout_s=30)
    assert counters(await task) == list(range(1, 3001))
    assert sink.lost == 0
    assert descriptors() == before


@pytest.mark.stalls
async def test_a_pipe_that_cannot_be_opened_anew_is_polled(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)  # what another user's pipe answers
        sink = JsonLines(writer, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    await asyncio.sleep(0.01)
    assert os.get_blocking(writer)
    os.close(writer)
    task = asyncio.create_task(read_to_end(reader))
    await sink.aclose(timeout_s=30)
    assert counters(await task) == list(range(1, 3001))


@pytest.mark.stalls
async def test_a_reader_that_never_reads_costs_bounded_memory_and_is_told(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = JsonLines(writer, "a1b2", EPOCH_NS, limit=8192)
    os.close(writer)
    for number in range(1, 5001):
        sink.publish(beat(number))
        if number % 100 == 0:
            await asyncio.sleep(0)
    lost = sink.lost
    assert lost > 3000
    task = asyncio.create_task(read_to_end(reader))
    await sink.aclose(timeout_s=30)
    data = await task
    assert counters(data) == list(range(1, 5001))
    assert sum(record.get("lines", 0) for record in records(data)) == sink.lost == lost


async def test_a_loss_is_told_as_soon_as_there_is_room_without_another_event(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = JsonLines(writer, "a1b2", EPOCH_NS, limit=1000)
    for number in range(1, 101):
        sink.publish(beat(number))
    await asyncio.sleep(0)
    assert counters(os.read(reader, 65536)) == list(range(1, 101))
    await sink.aclose()


async def test_closing_waits_no_longer_than_it_may(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    before = descriptors()
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    with anyio.fail_after(20):
        await sink.aclose(timeout_s=0.05)
    assert 0 < sink.lost < 3000
    assert descriptors() == before
    sink.publish(beat(1))
    await sink.aclose()


async def test_a_cancelled_close_still_closes(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    before = descriptors()
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    task = asyncio.create_task(sink.aclose(timeout_s=60))
    await asyncio.sleep(0.01)
    task.cancel()
    with anyio.fail_after(20):
        await asyncio.wait([task])
    assert task.cancelled()
    assert descriptors() == before


async def test_a_cancelled_scope_still_gets_its_last_lines_out(tmp_path: Path) -> None:
    path = tmp_path / "boot.jsonl"
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    with anyio.CancelScope() as scope:
        sink.publish(beat(1))
        scope.cancel()
        await sink.aclose()
    assert counters(path.read_bytes()) == [1]


async def test_a_closed_pipe_costs_one_warning(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = pipe
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    os.close(reader)
    with caplog.at_level(logging.WARNING, "asyncvmm.events"):
        for number in range(1, 11):
            sink.publish(beat(number))
            await asyncio.sleep(0)
    assert len(caplog.records) == 1
    assert "Broken pipe" in caplog.text
    assert sink.lost == 10
    await sink.aclose()


async def test_a_reader_that_dies_while_we_wait_for_it_is_noticed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    await asyncio.sleep(0.01)
    os.close(reader)
    with anyio.fail_after(20):
        await sink.aclose(timeout_s=60)
    assert sink.lost > 0


async def test_a_full_disk_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonLines("/dev/full", "a1b2", EPOCH_NS)
    with caplog.at_level(logging.WARNING, "asyncvmm.events"):
        for number in range(1, 11):
            sink.publish(beat(number))
            await asyncio.sleep(0)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert sink.lost == 10
    await sink.aclose()


async def test_a_callback_that_raises_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: bytes) -> None:
        raise RuntimeError("boom")

    sink = JsonLines(broken, "a1b2", EPOCH_NS)
    with caplog.at_level(logging.WARNING, "asyncvmm.events"):
        sink.publish(beat(1))
        await asyncio.sleep(0)
        sink.publish(beat(2))
        await sink.aclose()
    assert len(caplog.records) == 1
    assert "boom" in caplog.text
    assert sink.lost == 2


async def test_a_line_longer_than_a_pipe_write_arrives_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = JsonLines(writer, "a1b2", EPOCH_NS)
    os.close(writer)
    sink.publish(SerialLine(1, "console", "\x01" * 4096))
    await sink.aclose()
    (record,) = records(await read_to_end(reader))
    assert record["text"] == "\x01" * 4096


def test_lines_published_before_the_loop_runs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "boot.jsonl"
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    sink.publish(beat(1))
    asyncio.run(sink.aclose())
    assert counters(path.read_bytes()) == [1]


def test_closing_without_a_loop_writes_what_it_can(tmp_path: Path) -> None:
    path = tmp_path / "boot.jsonl"
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    sink.publish(beat(1))
    sink.close()
    sink.close()
    assert counters(path.read_bytes()) == [1]
