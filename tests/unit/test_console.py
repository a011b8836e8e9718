from __future__ import annotations

from array import array
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.console import Console


async def nowhere(data: bytes) -> None:
    """Take what is written."""


@pytest.fixture
def console() -> Console:
    """A console that no machine stands behind."""
    return Console(nowhere)


@pytest.mark.anyio
async def test_what_is_written_goes_to_the_machine() -> None:
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    await Console(write).write(b"ls\n")
    assert written == [b"ls\n"]


@pytest.mark.anyio
@pytest.mark.parametrize("data", [b"ab", bytearray(b"ab"), memoryview(b"ab"), array("H", [0x6261])])
async def test_bytes_are_written_in_whatever_form_they_come(data: Any) -> None:
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    await Console(write).write(data)
    assert written == [b"ab"]


@pytest.mark.anyio
@pytest.mark.parametrize("data", ["ls\n", [300], 5, None])
async def test_what_is_not_bytes_is_not_written(console: Console, data: Any) -> None:
    with pytest.raises(TypeError):
        await console.write(data)


@pytest.mark.anyio
async def test_a_reader_gets_what_comes_from_then_on_until_the_end(console: Console) -> None:
    console.feed(b"missed", 0)
    reader = console.subscribe()
    console.feed(b"one ", 0)
    console.feed(b"two", 0)
    console.end()
    assert [chunk async for chunk in reader] == [b"one two"]
    assert reader.lost == 0


@pytest.mark.anyio
async def test_a_waiting_reader_is_woken(console: Console) -> None:
    chunks: list[bytes] = []

    async def read() -> None:
        async for chunk in console:
            chunks.append(chunk)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        console.feed(b"a", 0)
        await anyio.wait_all_tasks_blocked()
        console.feed(b"b", 0)
        await anyio.wait_all_tasks_blocked()
        console.end()
    assert chunks == [b"a", b"b"]


@pytest.mark.anyio
async def test_readers_do_not_take_from_each_other(console: Console) -> None:
    readers = [console.subscribe(), console.subscribe()]
    console.feed(b"both", 0)
    assert [await anext(reader) for reader in readers] == [b"both", b"both"]


@pytest.mark.anyio
async def test_a_reader_of_a_console_that_ended_gets_nothing(console: Console) -> None:
    console.end()
    assert [chunk async for chunk in console] == []


@pytest.mark.anyio
async def test_a_closed_reader_ends_and_no_longer_counts(console: Console) -> None:
    reader = console.subscribe()
    await reader.aclose()
    console.feed(b"x", 0)
    assert [chunk async for chunk in reader] == []


@pytest.mark.anyio
async def test_lines_are_cut_at_newlines_and_the_last_needs_none(console: Console) -> None:
    lines: list[str] = []

    async def read() -> None:
        async for line in console.lines():
            lines.append(line)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        console.feed(b"first\r\nsec", 0)
        console.feed(b"ond \xff\nrest", 0)
        console.end()
    assert lines == ["first", "second \ufffd", "rest"]


@given(chunks=st.lists(st.binary(max_size=40), max_size=20), capacity=st.integers(1, 64))
def test_a_slow_reader_keeps_the_newest_bytes_and_counts_the_others(chunks: list[bytes], capacity: int) -> None:
    console = Console(nowhere)
    reader = console.subscribe(capacity)
    for chunk in chunks:
        console.feed(chunk, 0)
    data, written = reader.take(), b"".join(chunks)
    assert len(data) <= capacity
    assert written.endswith(data)
    assert len(data) + reader.lost == len(written)


def test_bytes_lost_on_the_way_count_as_well(console: Console) -> None:
    reader = console.subscribe(4)
    console.feed(b"abcdef", 10)
    assert (reader.take(), reader.lost) == (b"cdef", 12)


@given(chunks=st.lists(st.binary(max_size=3000), max_size=8))
def test_the_tail_is_the_end_of_all_output(chunks: list[bytes]) -> None:
    console = Console(nowhere)
    for chunk in chunks:
        console.feed(chunk, 0)
    assert console.tail == b"".join(chunks)[-4096:]
