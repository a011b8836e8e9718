"""A console port over a real socket."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import anyio
import pytest

from asyncvmm.streams.socket_port import SocketPort

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pair() -> AsyncIterator[tuple[SocketPort, socket.socket]]:
    """A port, and the machine's end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    async with await SocketPort.from_socket(ours, "data") as port:
        yield port, theirs
    theirs.close()


async def test_bytes_go_both_ways(pair: tuple[SocketPort, socket.socket]) -> None:
    port, machine = pair
    await port.send(b"in")
    assert machine.recv(10) == b"in"
    machine.send(b"out")
    assert await port.receive() == b"out"
    assert port.name == "data"


@pytest.mark.parametrize("unread", [b"", b"never read"])
async def test_the_stream_ends_when_the_machine_does(pair: tuple[SocketPort, socket.socket], unread: bytes) -> None:
    port, machine = pair
    await port.send(unread)
    machine.close()
    with pytest.raises(anyio.EndOfStream):
        await port.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await port.send(b"x")


async def test_after_an_eof_of_ours_the_guest_can_still_write(pair: tuple[SocketPort, socket.socket]) -> None:
    port, machine = pair
    await port.send_eof()
    with pytest.raises(anyio.ClosedResourceError):
        await port.send(b"x")
    machine.send(b"out")
    assert await port.receive() == b"out"


async def test_a_closed_port_says_so(pair: tuple[SocketPort, socket.socket]) -> None:
    port, _ = pair
    await port.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await port.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await port.send(b"x")
