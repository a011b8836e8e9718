from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import pty
import re
import select
import socket
import tempfile
import tty
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.types import GuestHeartbeat, SerialLine
from tests.support.lines import VALIDATOR

pytestmark = pytest.mark.anyio

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


def descriptors() -> set[str]:
    # Looked at once the listing's own descriptor is closed.
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


async def read_to_end(fd: int) -> bytes:
    return await anyio.to_thread.run_sync(lambda: b"".join(iter(lambda: os.read(fd, 65536), b"")))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):  # the test may have closed it
            os.close(fd)


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


@pytest.mark.parametrize("target", ["/dev/null", "fd"])
async def test_the_null_device_swallows_everything(target: str) -> None:
    fd = os.open("/dev/null", os.O_WRONLY)
    sink = JsonLines(fd if target == "fd" else target, "a1b2", EPOCH_NS)
    os.close(fd)
    sink.publish(beat(1))
    await sink.aclose()
    assert sink.lost == 0


async def test_a_fifo_with_a_reader_is_written_and_one_without_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="a FIFO with a reader"):
        JsonLines(path, "a1b2", EPOCH_NS)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(path, "a1b2", EPOCH_NS)
    sink.publish(beat(1))
    await sink.aclose()
    assert counters(os.read(reader, 4096)) == [1]
    os.close(reader)


@pytest.mark.stalls
async def test_a_unix_socket_is_connected_to_and_written() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = f"{folder}/s"
        server.bind(path)
        server.listen()
        sink = JsonLines(f"unix:{path}", "a1b2", EPOCH_NS)
        client, _ = server.accept()
        with client:
            for number in range(1, 5001):
                sink.publish(beat(number))
            await asyncio.sleep(0.01)
            task = asyncio.create_task(read_to_end(client.fileno()))
            await sink.aclose(timeout_s=30)
            assert counters(await task) == list(range(1, 5001))


async def test_a_lent_blocking_socket_never_blocks_us() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, theirs:
        sink = JsonLines(ours.fileno(), "a1b2", EPOCH_NS)
        assert ours.getblocking()
        for number in range(1, 3001):
            sink.publish(beat(number))
        with anyio.fail_after(20):
            await sink.aclose(timeout_s=0.05)
        assert sink.lost > 0
        assert os.get_blocking(ours.fileno())


async def test_a_stopped_terminal_never_blocks_us() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    sink = JsonLines(slave, "a1b2", EPOCH_NS)
    for number in range(1, 3001):
        sink.publish(beat(number))
    with anyio.fail_after(20):
        await sink.aclose(timeout_s=0.05)
    assert os.get_blocking(slave)
    assert sink.lost > 0
    assert select.select([master], [], [], 0)[0]
    os.close(master)
    os.close(slave)


async def test_a_lent_file_keeps_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as file:
        file.write(b"{}\n")
        sink = JsonLines(file.fileno(), "a1b2", EPOCH_NS)
        sink.publish(beat(1))
        await sink.aclose()
        file.write(b"{}\n")
    first, line, last = path.read_bytes().splitlines(keepends=True)
    assert (first, last, counters(line)) == (b"{}\n", b"{}\n", [1])


@pytest.mark.stalls
async def test_two_vms_on_one_pipe_do_not_tear_each_others_lines(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sinks = [JsonLines(writer, name, EPOCH_NS) for name in ("one", "two")]
    os.close(writer)
    task = asyncio.create_task(read_to_end(reader))
    for number in range(1, 3001):
        for sink in sinks:
            sink.publish(beat(number))
    async with anyio.create_task_group() as group:
        for sink in sinks:
            group.start_soon(sink.aclose, 30)
    found = records(await task)
    for name in ("one", "two"):
        assert [record["counter"] for record in found if record["vm"] == name] == list(range(1, 3001))


async def test_stdout_is_a_dash(capfd: pytest.CaptureFixture[str]) -> None:
    sink = JsonLines("-", "a1b2", EPOCH_NS)
    sink.publish(beat(1))
    await sink.aclose()
    assert counters(capfd.readouterr().out.encode()) == [1]
    os.fstat(1)


@pytest.mark.parametrize(
    "target", ["/nowhere/at/all", "/", "", "unix:/nowhere", f"unix:/{'x' * 200}", "a\0b", 99_999, -1]
)
async def test_what_cannot_be_opened_is_refused_at_once(target: str | int) -> None:
    before = descriptors()
    with pytest.raises(ConfigError, match=r"expected .*found "):
        JsonLines(target, "a1b2", EPOCH_NS)
    assert descriptors() == before


async def coroutine_function(data: bytes) -> None:
    """A callback that nobody would await."""


class AsyncCallable:
    async def __call__(self, data: bytes) -> None:
        """As above."""


@pytest.mark.parametrize("target", [None, 1.5, True, False, b"path", ["path"]])
async def test_what_is_no_target_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match=f"a descriptor or a callback, found {re.escape(repr(target))}"):
        JsonLines(target, "a1b2", EPOCH_NS)


@pytest.mark.parametrize("target", [coroutine_function, partial(coroutine_function), AsyncCallable()])
async def test_a_callback_that_would_have_to_be_awaited_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="no coroutine function"):
        JsonLines(target, "a1b2", EPOCH_NS)


async def test_a_descriptor_for_reading_is_refused(pipe: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="opened for reading"):
        JsonLines(pipe[0], "a1b2", EPOCH_NS)


async def test_a_socket_that_nobody_listens_on_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        for target in (f"unix:{folder}/s", f"{folder}/s"):
            with pytest.raises(ConfigError):
                JsonLines(target, "a1b2", EPOCH_NS)


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
