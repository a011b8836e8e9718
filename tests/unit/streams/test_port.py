"""A port as a program sees it: over a real console device, with a driver that keeps to the rules."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console.control import PORT_OPEN, PORT_READY, Control
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, VirtioConsole
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.streams.port import PortStream
from asyncvmm.testing.driver import Driver

pytestmark = pytest.mark.anyio

RECEIVE, TRANSMIT = 4, 5
BACKLOG = 1000


class Guest:
    """A guest with one named port, which it opens and closes."""

    def __init__(self, memory_size: int = 6 << 14, queue_size: int | None = None) -> None:
        self.device = VirtioConsole(ConsoleConfig(ports=("data",)), ConsoleMetrics(), backlog_bytes=BACKLOG)
        self.driver = Driver(self.device, memory_size=memory_size, queue_size=queue_size)
        for _ in range(8):
            self.driver.send(CONTROL_RECEIVE, writable=[64])
        self.tell(PORT_READY, 1)
        self.port = PortStream(self.device, self.device.ports[1])

    def tell(self, event: int, value: int) -> None:
        self.driver.request(CONTROL_TRANSMIT, [struct.pack("<IHH", 1, event, value)])

    def open(self) -> None:
        self.tell(PORT_OPEN, 1)

    def close(self) -> None:
        self.tell(PORT_OPEN, 0)

    def write(self, data: bytes) -> None:
        self.driver.send(TRANSMIT, [data])
        self.driver.kick(TRANSMIT)
        self.driver.used(TRANSMIT)

    def read(self, room: int = 100) -> bytes:
        self.driver.send(RECEIVE, writable=[room])
        self.driver.kick(RECEIVE)
        return b"".join(used.data for used in self.driver.used(RECEIVE))

    def hears(self) -> list[Control]:
        return [Control.parse(used.data) for used in self.driver.used(CONTROL_RECEIVE)]


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    guest = Guest()
    guest.open()
    guest.hears()
    yield guest
    await guest.port.aclose()


@asynccontextmanager
async def at_once() -> AsyncIterator[None]:
    """What is inside must not wait for anything."""
    with anyio.fail_after(5):
        yield


# -- receiving ---------------------------------------------------------------------------------------------------------


async def test_a_reader_gets_what_the_guest_writes_when_it_does(guest: Guest) -> None:
    async with at_once(), anyio.create_task_group() as tasks:

        async def receive() -> None:
            assert await guest.port.receive() == b"hello"
            assert await guest.port.receive(3) == b"lon"
            assert await guest.port.receive() == b"ger"

        tasks.start_soon(receive)
        await anyio.sleep(0.01)
        guest.write(b"hello")
        await anyio.sleep(0.01)
        guest.write(b"longer")


async def test_a_reader_that_is_cancelled_loses_nothing(guest: Guest) -> None:
    with anyio.move_on_after(0.01):
        await guest.port.receive()
    guest.write(b"still here")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await guest.port.receive()
    assert await guest.port.receive() == b"still here"


async def test_a_slow_reader_gets_every_byte(guest: Guest) -> None:
    sent = b"".join(b"%04d " % number for number in range(2000))
    for at in range(0, len(sent), 500):
        guest.write(sent[at : at + 500])
    got = b""
    async with at_once():
        while len(got) < len(sent):
            got += await guest.port.receive(300)
    assert got == sent
    assert guest.port.lost == 0


async def test_two_readers_at_once_are_refused(guest: Guest) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guest.port.receive)
        await anyio.sleep(0.01)
        with pytest.raises(anyio.BusyResourceError):
            await guest.port.receive()
        tasks.cancel_scope.cancel()


async def test_no_bytes_cannot_be_asked_for(guest: Guest) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        await guest.port.receive(0)


# -- the guest's end ---------------------------------------------------------------------------------------------------


async def test_the_stream_ends_behind_the_last_byte_when_the_guest_closes(guest: Guest) -> None:
    guest.write(b"last words")
    guest.close()
    async with at_once():
        assert [chunk async for chunk in guest.port] == [b"last words"]
        with pytest.raises(anyio.EndOfStream):
            await guest.port.receive()


async def test_a_waiting_reader_hears_the_end(guest: Guest) -> None:
    async with at_once(), anyio.create_task_group() as tasks:

        async def receive() -> None:
            with pytest.raises(anyio.EndOfStream):
                await guest.port.receive()

        tasks.start_soon(receive)
        await anyio.sleep(0.01)
        guest.close()


async def test_when_the_guest_opens_again_the_stream_goes_on(guest: Guest) -> None:
    guest.close()
    async with at_once(), anyio.create_task_group() as tasks:
        tasks.start_soon(guest.port.wait_open)
        await anyio.sleep(0.01)
        guest.open()
    guest.write(b"again")
    assert await guest.port.receive() == b"again"


async def test_a_close_that_nobody_saw_before_the_next_open_ends_nothing(guest: Guest) -> None:
    guest.write(b"first ")
    guest.close()
    guest.open()
    guest.write(b"second")
    assert await guest.port.receive() == b"first second"


async def test_before_the_guest_opens_reader_and_writer_wait() -> None:
    guest = Guest()
    for call in (guest.port.receive(), guest.port.send(b"x")):
        with anyio.move_on_after(0.02) as waited:
            await call
        assert waited.cancelled_caught


async def test_what_the_guest_wrote_before_it_stopped_can_be_read(guest: Guest) -> None:
    guest.write(b"last words")
    guest.port.end()
    async with at_once():
        assert await guest.port.receive() == b"last words"
        with pytest.raises(anyio.EndOfStream):
            await guest.port.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await guest.port.send(b"x")
        guest.close()
        with pytest.raises(anyio.EndOfStream):
            await guest.port.wait_open()


async def test_a_guest_whose_driver_goes_away_has_closed_the_port(guest: Guest) -> None:
    guest.driver.reset()
    with pytest.raises(anyio.EndOfStream):
        await guest.port.receive()


async def test_who_waits_when_a_driver_goes_away_on_a_vcpu_s_thread_is_told(guest: Guest) -> None:
    reading = asyncio.ensure_future(guest.port.receive())
    writing = asyncio.ensure_future(guest.port.send(b"x"))
    await anyio.sleep(0.01)
    await anyio.to_thread.run_sync(guest.driver.reset)
    async with at_once():
        with pytest.raises(anyio.EndOfStream):
            await reading
        with pytest.raises(anyio.BrokenResourceError):
            await writing


# -- sending -----------------------------------------------------------------------------------------------------------


async def test_sending_returns_when_the_guest_has_taken_all(guest: Guest) -> None:
    done = anyio.Event()

    async def send() -> None:
        await guest.port.send(b"0123456789")
        done.set()

    async with at_once(), anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await anyio.sleep(0.01)
        assert guest.read(room=6) == b"012345"
        await anyio.sleep(0.01)
        assert not done.is_set()
        assert guest.read() == b"6789"
        await done.wait()


async def test_a_send_that_is_cancelled_sends_no_more(guest: Guest) -> None:
    with anyio.move_on_after(0.01):
        await guest.port.send(b"never")
    guest.driver.send(RECEIVE, writable=[10])
    guest.driver.kick(RECEIVE)
    assert guest.driver.used(RECEIVE) == []
    async with at_once():
        await guest.port.send(b"now")
    assert [used.data for used in guest.driver.used(RECEIVE)] == [b"now"]


@pytest.mark.parametrize("goes", ["close", "stop"])
async def test_a_guest_that_goes_breaks_a_send(guest: Guest, goes: str) -> None:
    async with at_once(), anyio.create_task_group() as tasks:

        async def send() -> None:
            with pytest.raises(anyio.BrokenResourceError):
                await guest.port.send(b"anybody?")

        tasks.start_soon(send)
        await anyio.sleep(0.01)
        guest.close() if goes == "close" else guest.port.end()


async def test_two_writers_at_once_are_refused(guest: Guest) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guest.port.send, b"x")
        await anyio.sleep(0.01)
        with pytest.raises(anyio.BusyResourceError):
            await guest.port.send(b"y")
        tasks.cancel_scope.cancel()


async def test_nothing_can_be_sent_without_waiting(guest: Guest) -> None:
    async with at_once():
        await guest.port.send(b"")


async def test_a_large_send_gives_others_their_turn() -> None:
    guest = Guest(memory_size=6 << 17)
    guest.open()
    turns = 0
    for _ in range(60):
        guest.driver.send(RECEIVE, writable=[1000])

    async def count() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with at_once(), anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await checkpoint()
        await guest.port.send(bytes(60_000))
        tasks.cancel_scope.cancel()
    assert turns >= 2


# -- closing -----------------------------------------------------------------------------------------------------------


async def test_the_guest_sees_the_host_come_and_go() -> None:
    guest = Guest()
    assert guest.hears()[-1] == Control(1, PORT_OPEN, 1)
    guest.open()
    await guest.port.aclose()
    await guest.port.aclose()
    assert guest.hears() == [Control(1, PORT_OPEN, 0)]


async def test_a_closed_port_says_so_and_wakes_who_waits(guest: Guest) -> None:
    async with at_once(), anyio.create_task_group() as tasks:

        async def call(function: str, *arguments: bytes) -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await getattr(guest.port, function)(*arguments)

        tasks.start_soon(call, "receive")
        tasks.start_soon(call, "send", b"x")
        await anyio.sleep(0.01)
        await guest.port.aclose()
    for function, arguments in (("receive", ()), ("send", (b"x",)), ("send_eof", ())):
        await call(function, *arguments)


async def test_after_an_eof_of_ours_the_guest_can_still_write(guest: Guest) -> None:
    await guest.port.send_eof()
    with pytest.raises(anyio.ClosedResourceError):
        await guest.port.send(b"x")
    guest.write(b"out")
    assert await guest.port.receive() == b"out"


# -- much --------------------------------------------------------------------------------------------------------------


async def test_megabytes_arrive_whole() -> None:
    guest = Guest(memory_size=6 << 18)
    guest.device.ports[1].limit = 1 << 16
    guest.open()
    block = bytes(range(256)) * 64
    wrote, got = hashlib.sha256(), hashlib.sha256()

    async def write() -> None:
        for batch in range(32):
            for number in range(8):
                data = struct.pack("<II", batch, number) + block
                guest.driver.send(TRANSMIT, [data])
                wrote.update(data)
            guest.driver.kick(TRANSMIT)
            taken = 0
            while (taken := taken + len(guest.driver.used(TRANSMIT))) < 8:
                await checkpoint()
        guest.close()

    async with at_once(), anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        async for chunk in guest.port:
            got.update(chunk)
    assert got.digest() == wrote.digest()
    assert guest.device.metrics.tx_throttled > 0
