"""One end of a socket pair: what was sent and not read yet, and descriptors that go with a write."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest

from asyncvmm.machine.qemu.channel import MOST_UNREAD, Channel

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Channel, socket.socket]]:
    """A channel that remembers, and what its peer keeps of the other end."""
    channel = Channel(asyncio.get_running_loop())
    channel.remember_sent()
    with channel.peer.dup() as theirs:
        channel.peer.close()
        yield channel, theirs
        channel.close()


async def test_what_the_peer_has_not_read_is_known(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    assert channel.unread() == b""
    await channel.write(b"first ")
    await channel.write(b"second")
    assert channel.unread() == b"first second"
    assert theirs.recv(8) == b"first se"
    assert channel.unread() == b"cond"
    theirs.recv(100)
    assert channel.unread() == b""


async def test_no_more_is_remembered_than_a_socket_can_hold(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    for number in range(5 * MOST_UNREAD // 1000):
        await channel.write(b"%4d" % number * 250)
        theirs.recv(1000)
    assert len(channel._last) <= 2 * MOST_UNREAD
    await channel.write(b"the last")
    assert channel.unread() == b"the last"


async def test_what_a_socket_held_fits_into_another(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    full = os.urandom(40_000)
    channel.send_unread(full)
    assert channel.unread() == full
    received = b""
    while len(received) < len(full):
        received += theirs.recv(65536)
    assert received == full


async def test_one_that_does_not_remember_says_nothing() -> None:
    channel = Channel(asyncio.get_running_loop())
    channel.write_now(b"x")
    assert channel.unread() == b""
    channel.close()
    channel.close()


async def test_a_descriptor_goes_with_the_first_byte() -> None:
    channel = Channel(asyncio.get_running_loop())
    channel.peer.setblocking(False)
    read_end, write_end = os.pipe()
    await channel.write(b"take this", write_end)
    os.close(write_end)
    data, (theirs,), _, _ = socket.recv_fds(channel.peer, 100, 1)
    assert data == b"take this"
    os.write(theirs, b"through it")
    assert os.read(read_end, 100) == b"through it"
    os.close(theirs)
    os.close(read_end)
    channel.close()
