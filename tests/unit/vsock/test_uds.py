"""The unix sockets in front of a guest, used as Firecracker's are."""

# ruff: noqa: ASYNC240 (a path is looked at, nothing waits)

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketStream

from asyncvmm.errors import ConfigError
from asyncvmm.vsock import uds as uds_module
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.uds import UnixSockets
from tests.support.vsock_guest import GuestKernel

pytestmark = pytest.mark.anyio

ECHO, OTHER, NOBODY = 7, 9, 11
HOST_PORT = 52


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v.sock"


@pytest.fixture
async def sockets(host: VsockHost, kernel: GuestKernel, path: Path) -> AsyncIterator[UnixSockets]:
    sockets = UnixSockets(host, path, kernel.metrics)
    sockets.start()
    yield sockets
    await sockets.aclose()


async def ask(path: Path, request: bytes) -> tuple[SocketStream, bytes]:
    """Connect, say ``request``, and give the first line of the answer, empty if the socket was closed."""
    client = await anyio.connect_unix(path)
    await client.send(request)
    answer = b""
    try:
        while not answer.endswith(b"\n"):
            answer += await client.receive(1)
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        pass
    return client, answer


async def read_all(client: SocketStream) -> bytes:
    return b"".join([chunk async for chunk in client])


async def test_a_client_reaches_the_guest(sockets: UnixSockets, kernel: GuestKernel, path: Path) -> None:
    client, answer = await ask(path, b"CONNECT 7\nfirst ")
    word, port = answer.split()
    assert word == b"OK"
    assert (ECHO, int(port)) in kernel.peers
    await client.send(b"second")
    await client.send_eof()
    assert await read_all(client) == b"first second"
    await client.aclose()
    await kernel.until(lambda: kernel.device.muxer.held == 0)


async def test_a_refused_client_is_hung_up_on(sockets: UnixSockets, kernel: GuestKernel, path: Path) -> None:
    client, answer = await ask(path, b"CONNECT %d\n" % NOBODY)
    assert answer == b""
    assert kernel.metrics.conn_event_fails == 1
    await client.aclose()


@pytest.mark.parametrize(
    "request_",
    [b"HELLO 7\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 99999999999\n", b"CONNECT 4294967295\n"],
)
async def test_a_request_that_is_none_is_hung_up_on(
    sockets: UnixSockets, kernel: GuestKernel, path: Path, request_: bytes
) -> None:
    client, answer = await ask(path, request_)
    assert answer == b""
    assert kernel.metrics.conns_added == 0
    await client.aclose()


async def test_a_request_without_an_end_is_hung_up_on(sockets: UnixSockets, path: Path) -> None:
    client, answer = await ask(path, b"CONNECT " + b" " * 100)
    assert answer == b""
    await client.aclose()


async def test_a_silent_client_is_not_waited_for_for_ever(
    sockets: UnixSockets, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uds_module, "HANDSHAKE_TIMEOUT_S", 0.02)
    client, answer = await ask(path, b"CONN")
    assert answer == b""
    await client.aclose()


async def test_a_guest_reaches_who_listens_behind_the_name(
    sockets: UnixSockets, kernel: GuestKernel, path: Path
) -> None:
    async def answer(client: SocketStream) -> None:
        async with client:
            await client.send((await client.receive()).upper())

    async with (
        await anyio.create_unix_listener(f"{path}_{HOST_PORT}") as listener,
        anyio.create_task_group() as group,
    ):
        group.start_soon(listener.serve, answer)
        peer = kernel.connect(2000, HOST_PORT)
        peer.to_send += b"hello"
        await kernel.until(lambda: peer.ended_by_host)
        assert peer.got == b"HELLO"
        kernel.close((2000, HOST_PORT))
        await kernel.until(lambda: kernel.device.muxer.held == 0)
        group.cancel_scope.cancel()


async def test_a_guest_is_refused_where_nobody_listens(
    sockets: UnixSockets, host: VsockHost, kernel: GuestKernel, path: Path
) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(f"{path}_{HOST_PORT}")
    stale.close()
    peers = [kernel.connect(2000, HOST_PORT), kernel.connect(2000, HOST_PORT + 1)]
    await kernel.until(lambda: all(peer.over for peer in peers))
    assert kernel.device.muxer.held == 0


async def test_a_listener_of_the_program_comes_first(
    sockets: UnixSockets, host: VsockHost, kernel: GuestKernel, path: Path
) -> None:
    async with await anyio.create_unix_listener(f"{path}_{HOST_PORT}"), host.listen(HOST_PORT) as listener:
        kernel.connect(2000, HOST_PORT)
        await (await listener.accept()).aclose()


async def test_a_client_that_does_not_read_stops_the_guest_and_not_the_host(
    sockets: UnixSockets, kernel: GuestKernel, path: Path
) -> None:
    client, answer = await ask(path, b"CONNECT %d\n" % OTHER)
    peer = kernel.peers[OTHER, int(answer.split()[1])]
    size = 4 << 20
    peer.to_send += bytes(size)
    await asyncio.sleep(0.1)
    assert 0 < peer.sent < size
    peer.half_close_when_sent = True
    assert len(await read_all(client)) == size
    await client.aclose()
    await kernel.until(lambda: kernel.device.muxer.held == 0)


async def test_a_guest_that_goes_takes_its_client_along(sockets: UnixSockets, kernel: GuestKernel, path: Path) -> None:
    client, answer = await ask(path, b"CONNECT %d\n" % OTHER)
    peer = kernel.peers[OTHER, int(answer.split()[1])]
    peer.to_send += b"last words"
    peer.close_when_sent = True
    assert await read_all(client) == b"last words"
    await kernel.until(lambda: kernel.device.muxer.held == 0)
    await client.aclose()


async def test_a_client_that_goes_leaves_nothing(sockets: UnixSockets, kernel: GuestKernel, path: Path) -> None:
    client, answer = await ask(path, b"CONNECT %d\n" % OTHER)
    peer = kernel.peers[OTHER, int(answer.split()[1])]
    await client.aclose()
    await kernel.until(lambda: peer.ended_by_host)
    peer.to_send += b"is there anybody?"
    await kernel.until(lambda: kernel.device.muxer.held == 0)
    assert kernel.metrics.tx_write_fails == 1


async def test_a_close_ends_everything_and_removes_the_file(host: VsockHost, kernel: GuestKernel, path: Path) -> None:
    tasks = asyncio.all_tasks()
    sockets = UnixSockets(host, path, kernel.metrics)
    sockets.start()
    client, _ = await ask(path, b"CONNECT %d\n" % OTHER)
    waiting = await anyio.connect_unix(path)
    await sockets.aclose()
    await sockets.aclose()
    assert not path.exists()
    assert asyncio.all_tasks() == tasks
    assert kernel.device.muxer.held == 0
    for end in (client, waiting):
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await end.receive()
        await end.aclose()


async def test_a_close_before_a_task_s_first_step_leaves_nothing_either(
    host: VsockHost, kernel: GuestKernel, path: Path
) -> None:
    sockets = UnixSockets(host, path, kernel.metrics)
    sockets.start()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}_{HOST_PORT}")
        listening.listen()
        peer = kernel.connect(2000, HOST_PORT)
        await sockets.aclose()
        assert kernel.device.muxer.held == 0
        await kernel.until(lambda: peer.over)


async def test_only_the_owner_may_connect(sockets: UnixSockets, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_socket_that_nobody_serves_any_more_is_replaced(
    host: VsockHost, kernel: GuestKernel, path: Path
) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    sockets = UnixSockets(host, path, kernel.metrics)
    sockets.start()
    client, answer = await ask(path, b"CONNECT 7\n")
    assert answer.startswith(b"OK ")
    await client.aclose()
    await sockets.aclose()


async def test_a_file_that_is_not_ours_is_left_alone(
    sockets: UnixSockets, host: VsockHost, kernel: GuestKernel, path: Path
) -> None:
    with pytest.raises(ConfigError, match="in use"):
        UnixSockets(host, path, kernel.metrics).start()
    path.unlink()
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="another file"):
        UnixSockets(host, path, kernel.metrics).start()
    await sockets.aclose()
    assert path.read_bytes() == b"precious"


async def test_a_path_too_long_or_nowhere_is_refused(host: VsockHost, kernel: GuestKernel, tmp_path: Path) -> None:
    longest = "x" * (107 - 11 - len(os.fsencode(tmp_path)) - 1)
    with pytest.raises(ConfigError, match="96 bytes"):
        UnixSockets(host, tmp_path / (longest + "x"), kernel.metrics).start()
    sockets = UnixSockets(host, tmp_path / longest, kernel.metrics)
    sockets.start()
    await sockets.aclose()
    with pytest.raises(ConfigError):
        UnixSockets(host, tmp_path / "no" / "v.sock", kernel.metrics).start()
