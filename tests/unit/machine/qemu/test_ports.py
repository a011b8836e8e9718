"""A console port's socket as a byte stream, with the other end in our hand instead of QEMU's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import anyio
import pytest

from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.ports import ChannelStream

pytestmark = pytest.mark.anyio

PATIENCE_S = 20


@pytest.fixture
async def port() -> AsyncIterator[ChannelStream]:
    stream = ChannelStream("bulk", Channel(asyncio.get_running_loop()))
    yield stream
    await stream.aclose()
    stream._channel.close()


@pytest.fixture
def guest(port: ChannelStream) -> socket.socket:
    return port._channel.peer


async def test_what_the_guest_writes_is_received_in_order_and_no_more_than_asked_for(
    port: ChannelStream, guest: socket.socket
) -> None:
    guest.sendall(b"abcdef")
    assert [await port.receive(4), await port.receive(4)] == [b"abcd", b"ef"]


async def test_a_reader_waits_for_the_guest(port: ChannelStream, guest: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, lambda: guest.sendall(b"late"))
        with anyio.fail_after(PATIENCE_S):
            assert await port.receive() == b"late"


async def test_a_cancelled_reader_loses_nothing(port: ChannelStream, guest: socket.socket) -> None:
    with anyio.move_on_after(0.01) as scope:
        await port.receive()
    assert scope.cancelled_caught
    guest.sendall(b"still here")
    assert await port.receive() == b"still here"


async def test_what_is_sent_reaches_the_guest_however_long_it_is(port: ChannelStream, guest: socket.socket) -> None:
    data = bytes(range(256)) * 2000
    received = bytearray()

    def read_all() -> None:
        while len(received) < len(data):
            received.extend(guest.recv(65536))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, read_all)
        with anyio.fail_after(PATIENCE_S):
            await port.send(data)
    assert received == data


async def test_two_at_once_are_one_too_many(port: ChannelStream) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(port.receive)
        tasks.start_soon(port.send, bytes(10_000_000))
        await anyio.sleep(0.01)
        with pytest.raises(anyio.BusyResourceError):
            await port.receive()
        with pytest.raises(anyio.BusyResourceError):
            await port.send(b"x")
        tasks.cancel_scope.cancel()


async def test_the_end_of_the_machine_is_the_end_of_the_stream(port: ChannelStream, guest: socket.socket) -> None:
    guest.sendall(b"last words")
    guest.close()
    assert await port.receive() == b"last words"
    with pytest.raises(anyio.EndOfStream):
        await port.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await port.send(b"x")


async def test_what_a_machine_left_can_be_read_after_its_descriptors_are_gone(
    port: ChannelStream, guest: socket.socket
) -> None:
    guest.sendall(b"x" * 100_000)
    port.finish()
    assert port._channel.closed
    assert b"".join([chunk async for chunk in port]) == b"x" * 100_000
    with pytest.raises(anyio.BrokenResourceError):
        await port.send(b"x")


async def test_the_end_of_the_machine_wakes_who_waits(port: ChannelStream) -> None:
    ends: list[type[BaseException]] = []

    async def wait(action: object) -> None:
        try:
            await action  # type: ignore[misc]
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            ends.append(type(error))

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, port.receive())
            tasks.start_soon(wait, port.send(bytes(10_000_000)))
            await anyio.sleep(0.01)
            port.finish()
    assert set(ends) == {anyio.EndOfStream, anyio.BrokenResourceError}


async def test_a_closed_port_is_closed_for_its_reader_its_writer_and_the_guest(
    port: ChannelStream, guest: socket.socket
) -> None:
    other = guest.dup()
    await port.aclose()
    for action in (port.receive, lambda: port.send(b"x"), port.send_eof):
        with pytest.raises(anyio.ClosedResourceError):
            await action()
    with other:
        assert other.recv(1) == b""


async def test_after_the_end_of_sending_the_guest_is_still_heard(port: ChannelStream, guest: socket.socket) -> None:
    await port.send_eof()
    with pytest.raises(anyio.ClosedResourceError):
        await port.send(b"x")
    guest.sendall(b"go on")
    assert await port.receive() == b"go on"


async def test_nothing_at_all_cannot_be_asked_for(port: ChannelStream) -> None:
    with pytest.raises(ValueError, match="positive"):
        await port.receive(0)
