"""Streams and listeners on both event loops, against a guest's kernel that keeps to the specification."""

from __future__ import annotations

import asyncio
import gc
import threading

import anyio
import pytest

from asyncvmm.devices.virtio.vsock import muxer as muxer_module
from asyncvmm.devices.virtio.vsock.muxer import BUFFER
from asyncvmm.devices.virtio.vsock.packet import OP_RESPONSE, OP_RW
from asyncvmm.errors import ConfigError, StateError, VsockRefused, VsockTimeout
from asyncvmm.vsock import host as host_module
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.stream import VsockAttribute, VsockStream
from tests.support.vsock_guest import CID, RX_BUFFER, Guest, GuestKernel, Peer

pytestmark = pytest.mark.anyio

ECHO, OTHER, NOBODY = 7, 9, 11
HOST_PORT = 5000


async def meet(host: VsockHost, kernel: GuestKernel) -> tuple[VsockStream, Peer]:
    """A connection to a guest's program that only does what the test makes it do."""
    stream = await host.connect(OTHER)
    return stream, kernel.peers[OTHER, stream.extra(VsockAttribute.local_port)]


async def test_an_echo_returns_every_byte(host: VsockHost) -> None:
    data = bytes(range(256)) * 4096
    got = bytearray()

    async def read(stream: VsockStream) -> None:
        async for chunk in stream:
            got.extend(chunk)

    async with await host.connect(ECHO) as stream, anyio.create_task_group() as group:
        group.start_soon(read, stream)
        await stream.send(data)
        await stream.send_eof()
    assert got == data


async def test_a_stream_says_what_it_is(host: VsockHost) -> None:
    async with await host.connect(ECHO) as stream:
        assert stream.extra(VsockAttribute.peer_port) == ECHO
        assert stream.extra(VsockAttribute.peer_cid) == CID
        assert stream.extra(VsockAttribute.local_port) >= 1 << 30


async def test_a_port_where_nobody_listens_is_refused(host: VsockHost, kernel: GuestKernel) -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        await host.connect(NOBODY)
    assert isinstance(caught.value, VsockRefused)
    assert caught.value.port == NOBODY
    assert kernel.device.muxer.held == 0


@pytest.mark.parametrize("port", [-1, 1 << 32, (1 << 32) - 1, "7", True])
async def test_what_is_no_port_is_refused(host: VsockHost, port: int) -> None:
    with pytest.raises(ConfigError):
        await host.connect(port)
    with pytest.raises(ConfigError):
        host.listen(port)


async def test_a_guest_without_a_driver_is_waited_for(host: VsockHost, kernel: GuestKernel) -> None:
    kernel.driver.reset()
    async with anyio.create_task_group() as group:
        group.start_soon(host.connect, ECHO)
        await anyio.wait_all_tasks_blocked()
        kernel.start()


async def test_a_guest_that_does_not_answer_is_a_timeout(host: VsockHost, kernel: GuestKernel) -> None:
    kernel.driver.reset()
    with pytest.raises(VsockTimeout) as caught:
        await host.connect(ECHO, timeout=0.02)
    assert isinstance(caught.value, TimeoutError)
    assert kernel.device.muxer.held == len(kernel.device.muxer) == 0


async def test_a_cancelled_connect_leaves_nothing(host: VsockHost, kernel: GuestKernel) -> None:
    kernel.driver.reset()
    with anyio.move_on_after(0.02):
        await host.connect(ECHO)
    assert kernel.device.muxer.held == len(kernel.device.muxer) == 0


async def test_a_connect_too_many_is_refused(
    host: VsockHost, kernel: GuestKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muxer_module, "MAX_CONNECTIONS", 8)
    with kernel.device.host() as muxer:
        for _ in range(8):
            muxer.connect(OTHER)
    with pytest.raises(VsockRefused):
        await host.connect(ECHO)


async def test_a_slow_guest_slows_the_sender(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.reading = False
    with anyio.move_on_after(0.05) as scope:
        await stream.send(bytes(1 << 20))
    assert scope.cancelled_caught
    assert len(peer.buffered) == peer.room
    peer.reading = True
    await stream.send(b"the end")
    await kernel.until(lambda: peer.got.endswith(b"the end"))
    assert len(peer.got) == peer.room + 7
    await stream.aclose()


async def test_a_slow_host_slows_the_guest(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.to_send += bytes(3 * BUFFER)
    await kernel.until(lambda: peer.sent == BUFFER)
    await asyncio.sleep(0.02)
    assert peer.sent == BUFFER
    got = 0
    while got < 3 * BUFFER:
        got += len(await stream.receive())
    await stream.aclose()


async def test_more_than_one_turn_s_worth_goes_without_a_word_from_the_guest(anyio_backend: object) -> None:
    guest = Guest(rx_buffers=120, queue_size=256, event_idx=True)
    host = VsockHost(guest.device)
    async with anyio.create_task_group() as group:

        async def send() -> None:
            async with await host.connect(OTHER) as stream:
                await stream.send(bytes(100 * RX_BUFFER))

        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        request = guest.receive_one().header
        guest.send(OP_RESPONSE, OTHER, request.src_port, buf_alloc=1 << 20)
    assert sum(packet.op == OP_RW for packet in guest.receive()) == 100
    host.close()


async def test_a_receive_gives_no_more_than_asked(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.to_send += b"abc"
    assert await stream.receive(2) == b"ab"
    assert await stream.receive(2) == b"c"
    with pytest.raises(ValueError, match="positive"):
        await stream.receive(0)
    await stream.aclose()


async def test_a_guest_s_end_comes_after_all_it_sent(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.to_send += b"good bye"
    peer.close_when_sent = True
    await kernel.until(lambda: peer.over)
    assert await stream.receive() == b"good bye"
    for _ in range(2):
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
    with pytest.raises(anyio.BrokenResourceError):
        await stream.send(b"x")
    await stream.aclose()


async def test_a_half_closed_guest_still_listens(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.half_close_when_sent = True
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
    await stream.send(b"still there?")
    await kernel.until(lambda: peer.got == b"still there?")
    await stream.aclose()


async def test_a_sender_learns_of_a_guest_that_closed(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    peer.reading = False
    async with anyio.create_task_group() as group:

        async def send() -> None:
            with pytest.raises(anyio.BrokenResourceError):
                await stream.send(bytes(1 << 20))

        group.start_soon(send)
        await kernel.until(lambda: len(peer.buffered) == peer.room)
        peer.close_when_sent = True
    await stream.aclose()


async def test_a_reset_breaks_the_stream(host: VsockHost, kernel: GuestKernel) -> None:
    stream, _ = await meet(host, kernel)
    async with anyio.create_task_group() as group:

        async def receive() -> None:
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()

        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        vcpu = threading.Thread(target=kernel.driver.reset)
        vcpu.start()
        await anyio.to_thread.run_sync(vcpu.join)
    with pytest.raises(anyio.BrokenResourceError):
        await stream.send(b"x")
    await stream.aclose()
    kernel.start()


async def test_nothing_is_sent_after_an_end(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    await stream.send_eof()
    await stream.send_eof()
    with pytest.raises(anyio.BrokenResourceError):
        await stream.send(b"x")
    await kernel.until(lambda: peer.ended_by_host)
    await stream.aclose()


async def test_a_closed_stream_says_so_to_everybody(host: VsockHost, kernel: GuestKernel) -> None:
    stream, peer = await meet(host, kernel)
    async with anyio.create_task_group() as group:

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        await stream.aclose()
        await stream.aclose()
    for call in (stream.receive, stream.send_eof, lambda: stream.send(b"x")):
        with pytest.raises(anyio.ClosedResourceError):
            await call()
    await kernel.until(lambda: peer.over)
    await kernel.until(lambda: len(kernel.device.muxer) == 0)
    assert kernel.metrics.conns_killed == 0


async def test_two_tasks_do_not_share_a_direction(host: VsockHost, kernel: GuestKernel) -> None:
    stream, _ = await meet(host, kernel)
    async with anyio.create_task_group() as group:
        group.start_soon(stream.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await stream.receive()
        group.cancel_scope.cancel()
    await stream.aclose()


async def test_a_guest_that_does_not_confirm_a_close_is_reset(
    host: VsockHost, kernel: GuestKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "CLOSE_TIMEOUT_S", 0.02)
    kernel.answers_close = False
    stream, peer = await meet(host, kernel)
    await stream.aclose()
    await kernel.until(lambda: peer.over)
    assert kernel.metrics.conns_killed == 1
    assert len(kernel.device.muxer) == kernel.device.muxer.held == 0


# -- listening ---------------------------------------------------------------------------------------------------------


async def test_a_guest_reaches_a_listener(host: VsockHost, kernel: GuestKernel) -> None:
    async with host.listen(HOST_PORT) as listener:
        peer = kernel.connect(2000, HOST_PORT)
        peer.to_send += b"knock"
        async with await listener.accept() as stream:
            assert await stream.receive() == b"knock"
            await stream.send(b"come in")
            await kernel.until(lambda: peer.got == b"come in")


async def test_a_listener_serves(host: VsockHost, kernel: GuestKernel) -> None:
    async def answer(stream: VsockStream) -> None:
        async with stream:
            await stream.send((await stream.receive()).upper())

    async with host.listen(HOST_PORT) as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, answer)
        peers = [kernel.connect(2000 + number, HOST_PORT) for number in range(20)]
        for number, peer in enumerate(peers):
            peer.to_send += b"guest %d" % number
        await kernel.until(lambda: all(peer.over for peer in peers))
        assert [bytes(peer.got) for peer in peers] == [b"GUEST %d" % number for number in range(20)]
        group.cancel_scope.cancel()


async def test_a_port_without_a_listener_is_refused_to_the_guest(host: VsockHost, kernel: GuestKernel) -> None:
    peer = kernel.connect(2000, HOST_PORT)
    await kernel.until(lambda: peer.over)


async def test_a_full_line_refuses(host: VsockHost, kernel: GuestKernel) -> None:
    async with host.listen(HOST_PORT, backlog=2):
        peers = [kernel.connect(2000 + number, HOST_PORT) for number in range(3)]
        await kernel.until(lambda: peers[2].over)
        assert [peer.over for peer in peers] == [False, False, True]
    await kernel.until(lambda: all(peer.over for peer in peers))


async def test_a_port_has_one_listener_at_a_time(host: VsockHost) -> None:
    async with host.listen(HOST_PORT):
        with pytest.raises(ConfigError):
            host.listen(HOST_PORT)
    await host.listen(HOST_PORT).aclose()


async def test_a_closed_listener_says_so_to_who_waits(host: VsockHost) -> None:
    listener = host.listen(HOST_PORT)
    async with anyio.create_task_group() as group:

        async def accept() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await listener.accept()

        group.start_soon(accept)
        await anyio.wait_all_tasks_blocked()
        await listener.aclose()


async def test_the_machine_s_end_ends_everything(host: VsockHost, kernel: GuestKernel) -> None:
    stream, _ = await meet(host, kernel)
    listener = host.listen(HOST_PORT)
    host.close()
    host.close()
    with pytest.raises(anyio.BrokenResourceError):
        await stream.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await listener.accept()
    with pytest.raises(StateError):
        await host.connect(ECHO)
    with pytest.raises(StateError):
        host.listen(HOST_PORT)
    await stream.aclose()
    assert kernel.device.muxer.held == 0


async def test_many_connections_at_once(host: VsockHost, kernel: GuestKernel) -> None:
    async def talk(number: int) -> None:
        async with await host.connect(ECHO) as stream:
            await stream.send(b"%d" % number * 100)
            await stream.send_eof()
            assert b"".join([chunk async for chunk in stream]) == b"%d" % number * 100

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(talk, number)
    await kernel.until(lambda: len(kernel.device.muxer) == 0)
    assert kernel.device.muxer.held == 0
    assert kernel.metrics.conns_added == kernel.metrics.conns_removed == 100
    gc.collect()
