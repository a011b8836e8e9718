"""Links between a real card, under a test's driver, and a real stream socket or TAP interface."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.devices.virtio.net import HEADER_SIZE, MAX_FRAME, RX, TX, VirtioNet
from asyncvmm.errors import TapError
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.net.framing import FrameBuffer, FramingError, prefix
from asyncvmm.net.link import MAX_BACKLOG, Link
from asyncvmm.net.stream import StreamLink
from asyncvmm.net.tap import open_tap
from asyncvmm.net.tap_link import TapLink
from asyncvmm.testing.driver import Driver
from asyncvmm.testing.rings import Used

MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
NO_HEADER = bytes(HEADER_SIZE)

pytestmark = pytest.mark.anyio


def frame(payload: bytes = b"x" * 50, *, source: bytes = MAC, target: bytes = OTHER) -> bytes:
    return target + source + b"\x88\xb5" + payload


def framed(data: bytes) -> bytes:
    return prefix(len(data)) + data


def driven(link: Link, *, offloads: bool = False) -> Driver:
    device = VirtioNet(MAC, link, NetMetrics(), offloads=offloads)
    link.attach(device)
    driver = Driver(device, memory_size=4 << 20)
    driver.kick(RX)
    return driver


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await checkpoint()


async def received(driver: Driver, count: int) -> list[bytes]:
    """The frames of the next buffers that the card gives back."""
    found: list[bytes] = []

    def enough() -> bool:
        found.extend(entry.data[HEADER_SIZE:] for entry in driver.used(RX))
        return len(found) >= count

    await until(enough)
    return found


class Wire:
    """A stream link, and the socket at its other end."""

    def __init__(self) -> None:
        self.ours, self.peer = socket.socketpair()
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.peer.setblocking(False)
        self.downs: list[Exception] = []
        self.fails: list[Exception] = []
        loop = asyncio.get_running_loop()
        self.link = StreamLink(loop, self.ours.fileno(), on_down=self.downs.append, fail=self.fails.append)
        self.driver = driven(self.link)
        self.frames = FrameBuffer()

    def take(self) -> list[bytes]:
        """The frames that are there at the other end."""
        found = []
        try:
            while size := self.peer.recv_into(self.frames.space()):
                self.frames.fed(size)
                while (data := self.frames.peek()) is not None:
                    found.append(bytes(data))
                    self.frames.skip()
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        self.link.close()
        self.ours.close()
        self.peer.close()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()
    assert not wire.fails


async def test_frames_go_both_ways(wire: Wire) -> None:
    wire.driver.request(TX, [NO_HEADER + frame()])
    assert wire.take() == [frame()]
    wire.driver.send(RX, writable=[200])
    wire.driver.send(RX, writable=[200])
    wire.driver.kick(RX)
    wire.peer.send(framed(frame(b"1" * 50)) + framed(frame(b"2" * 50)))
    assert await received(wire.driver, 2) == [frame(b"1" * 50), frame(b"2" * 50)]
    assert wire.driver.interrupts


async def test_a_frame_that_comes_in_pieces_is_one(wire: Wire) -> None:
    wire.driver.send(RX, writable=[200])
    wire.driver.kick(RX)
    for byte in framed(frame()):
        wire.peer.send(bytes((byte,)))
        await checkpoint()
    assert await received(wire.driver, 1) == [frame()]


async def test_a_guest_without_buffers_stops_the_reading_until_it_has_some(wire: Wire) -> None:
    stream = b"".join(framed(frame(number.to_bytes(2, "big") + bytes(998))) for number in range(2000))
    sent = 0
    for _ in range(50):
        with suppress(BlockingIOError):
            sent += wire.peer.send(stream[sent:])
        await checkpoint()
    assert sent < len(stream), "what the guest does not take stays with the host"
    assert wire.driver.device.metrics.rx_packets_count == 0
    assert wire.driver.device.metrics.rx_tap_event_count <= 3
    taken: list[Used] = []
    with anyio.fail_after(20):
        while len(taken) < 2000:
            while wire.driver.queue(RX)._free:
                wire.driver.send(RX, writable=[1100])
            wire.driver.kick(RX)
            with suppress(BlockingIOError):
                sent += wire.peer.send(stream[sent:])
            await checkpoint()
            taken += wire.driver.used(RX)
    assert [int.from_bytes(entry.data[26:28], "big") for entry in taken] == list(range(2000))


async def test_a_host_that_does_not_read_holds_back_the_guest_in_bounded_memory(wire: Wire) -> None:
    big = NO_HEADER + frame(bytes(MAX_FRAME - 14))
    for _ in range(30):
        wire.driver.send(TX, [big])
    wire.driver.kick(TX)
    await anyio.sleep(0.01)
    assert 0 < wire.driver.device.metrics.tx_packets_count < 30
    assert wire.link.room() <= 0
    assert -wire.link.room() <= MAX_FRAME + 4
    found: list[bytes] = []
    with anyio.fail_after(5):
        while len(found) < 30:
            found += wire.take()
            await checkpoint()
    await until(lambda: wire.link.room() == MAX_BACKLOG)
    assert set(found) == {big[HEADER_SIZE:]}
    assert len(wire.driver.used(TX)) == 30


async def test_an_idle_link_costs_no_turns_of_the_loop(wire: Wire) -> None:
    wire.driver.request(TX, [NO_HEADER + frame()])
    before = wire.driver.device.metrics.rx_tap_event_count
    await anyio.sleep(0.02)
    assert wire.driver.device.metrics.rx_tap_event_count == before
    assert not wire.link._writing


async def test_a_helper_that_hangs_up_pulls_the_cable(wire: Wire) -> None:
    wire.peer.close()
    await until(lambda: wire.downs)
    assert isinstance(wire.downs[0], ConnectionError)
    assert wire.driver.config(6, 2) == b"\0\0"
    wire.driver.request(TX, [NO_HEADER + frame()])
    assert wire.driver.device.metrics.tx_fails == 1


async def test_a_helper_that_hangs_up_while_the_guest_sends_pulls_the_cable(wire: Wire) -> None:
    wire.peer.close()
    wire.driver.request(TX, [NO_HEADER + frame()])
    await until(lambda: wire.downs)
    assert wire.driver.device.metrics.tap_write_fails == 1
    assert wire.driver.config(6, 2) == b"\0\0"


async def test_bytes_that_are_no_frames_pull_the_cable(wire: Wire) -> None:
    wire.peer.send(b"\xff" * 64)
    await until(lambda: wire.downs)
    assert isinstance(wire.downs[0], FramingError)
    assert wire.driver.config(6, 2) == b"\0\0"


async def test_a_reset_stops_the_reading_and_a_new_driver_goes_on(wire: Wire) -> None:
    wire.driver.reset()
    wire.peer.send(framed(frame()))
    await anyio.sleep(0.01)
    assert not wire.link._reading
    wire.driver.start()
    wire.driver.send(RX, writable=[200])
    wire.driver.kick(RX)
    assert await received(wire.driver, 1) == [frame()]


# -- TAP ---------------------------------------------------------------------------------------------------------------

TAP = f"avmm{os.getpid() % 100000}"
ETH_P_ALL = 3


@pytest.fixture
def tap() -> Iterator[int]:
    fd = open_tap(TAP)
    yield fd
    os.close(fd)


class Host:
    """A packet socket at the host's end of the TAP."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind((TAP, 0))
        self._socket.setblocking(False)

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def seen(self, data: bytes) -> bool:
        """Whether that frame came in from the guest. The kernel's own chatter is passed over."""
        try:
            while True:
                found, (_, _, kind, *_) = self._socket.recvfrom(70000)
                if found == data and kind != socket.PACKET_OUTGOING:
                    return True
        except BlockingIOError:
            return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def host(tap: int) -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.mark.requires("tun")
async def test_frames_go_both_ways_through_a_tap(tap: int, host: Host) -> None:
    link = TapLink(asyncio.get_running_loop(), tap)
    driver = driven(link, offloads=True)
    try:
        driver.request(TX, [NO_HEADER, frame()])
        await until(lambda: host.seen(frame()))
        for _ in range(40):
            driver.send(RX, writable=[2000])
        driver.kick(RX)
        incoming = frame(b"in" * 25, source=OTHER, target=MAC)
        host.send(incoming)
        found: list[bytes] = []
        while incoming not in found:
            found += await received(driver, 1)
    finally:
        link.close()


@pytest.mark.requires("tun")
async def test_a_header_that_makes_no_sense_loses_its_frame_alone(tap: int, host: Host) -> None:
    link = TapLink(asyncio.get_running_loop(), tap)
    driver = driven(link, offloads=True)
    try:
        bogus = struct.pack("<BBHHHHH", 1, 1, 60000, 1400, 50000, 60000, 0)
        driver.request(TX, [bogus + frame()])
        assert driver.device.metrics.tap_write_fails == 1
        assert not link.down
        driver.request(TX, [NO_HEADER, frame()])
        await until(lambda: host.seen(frame()))
    finally:
        link.close()


@pytest.mark.requires("tun")
async def test_a_tap_that_is_in_use_is_refused(tap: int) -> None:
    with pytest.raises(TapError, match="nobody else has open") as caught:
        open_tap(TAP)
    assert caught.value.errno is not None


@pytest.mark.requires("tun")
async def test_an_interface_that_is_no_tap_is_refused() -> None:
    with pytest.raises(TapError, match="TAP lo"):
        open_tap("lo")


@pytest.mark.requires("tun")
async def test_a_tap_goes_with_its_descriptor() -> None:
    os.close(open_tap(TAP))
    assert TAP not in os.listdir("/sys/class/net")
