"""Where event lines can go: files, pipes, sockets, terminals, callbacks; and what is none of these."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import socket
import tempfile
import tty
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.events.jsonl import JsonLines
from tests.support.line_readers import EPOCH_NS, beat, counters, descriptors, read_to_end, records

pytestmark = pytest.mark.anyio


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
    with pytest.raises(ConfigError, match="closed, or open for reading"):
        JsonLines(pipe[0], "a1b2", EPOCH_NS)


async def test_a_socket_that_nobody_listens_on_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        for target in (f"unix:{folder}/s", f"{folder}/s"):
            with pytest.raises(ConfigError):
                JsonLines(target, "a1b2", EPOCH_NS)
