"""A guest's half of the socket device, over the driver of asyncvmm.testing: packets by hand, or a small kernel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs

from asyncvmm.devices.virtio.vsock.device import EVENT, RX, TX, VirtioVsock
from asyncvmm.devices.virtio.vsock.packet import (
    HEADER_SIZE,
    HOST_CID,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
)
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.testing.driver import Driver

CID = 3
PATIENCE_S = 10
RX_BUFFERS, RX_BUFFER = 16, 4096


@attrs.frozen
class Packet:
    header: Header
    payload: bytes

    @property
    def op(self) -> int:
        return self.header.op


def header(op: int, guest_port: int, host_port: int, size: int = 0, **fields: int) -> Header:
    """A guest's header to the host, with ample credit unless ``fields`` say otherwise."""
    made = Header(CID, HOST_CID, guest_port, host_port, size, TYPE_STREAM, op, 0, 256 * 1024, 0)
    return made._replace(**fields)


class Guest:
    """A device with a driver that sends what it is told, and takes what comes."""

    def __init__(self, *, rx_buffers: int = RX_BUFFERS, start: bool = True, **options: Any) -> None:
        self.metrics = VsockMetrics()
        self.device = VirtioVsock(CID, self.metrics)
        self.rx_buffers = rx_buffers
        self.driver = Driver(self.device, memory_size=3 << 19, start=False, **options)
        if start:
            self.start()

    def start(self) -> None:
        self.driver.start()
        self._outstanding = 0
        self.offer()

    def offer(self) -> None:
        """Receive buffers, once all that were there are used."""
        if not self._outstanding:
            for _ in range(self.rx_buffers):
                self.driver.send(RX, writable=[HEADER_SIZE, RX_BUFFER])
            self._outstanding = self.rx_buffers
            self.driver.kick(RX)

    def send_raw(self, *readable: bytes) -> None:
        self.driver.send(TX, readable=readable)
        self.driver.kick(TX)
        self.driver.used(TX)

    def send(self, op: int, guest_port: int, host_port: int, payload: bytes = b"", **fields: int) -> None:
        head = header(op, guest_port, host_port, **{"size": len(payload), **fields}).encode()
        self.send_raw(*([head, payload] if payload else [head]))

    def receive(self) -> list[Packet]:
        """What came since this was last asked."""
        self.driver.work()
        packets = []
        while used := self.driver.used(RX):
            self._outstanding -= len(used)
            for entry in used:
                head = Header.decode(entry.data)
                packets.append(Packet(head, entry.data[HEADER_SIZE : HEADER_SIZE + head.len]))
                assert entry.written == HEADER_SIZE + head.len
            self.offer()
        return packets

    def receive_one(self) -> Packet:
        (packet,) = self.receive()
        return packet

    def events(self) -> list[bytes]:
        return [used.data for used in self.driver.used(EVENT)]


@attrs.define
class Peer:
    """One connection as the kernel sees it. ``room`` is its receive buffer; ``reading`` whether a program reads."""

    room: int = 65536
    reading: bool = True
    buffered: bytearray = attrs.field(factory=bytearray)
    got: bytearray = attrs.field(factory=bytearray)
    to_send: bytearray = attrs.field(factory=bytearray)
    sent: int = 0
    taken: int = 0
    host_room: int = 0
    host_taken: int = 0
    established: bool = False
    ended_by_host: bool = False
    close_when_sent: bool = False
    half_close_when_sent: bool = False
    over: bool = False


class GuestKernel(Guest):
    """A guest that answers as Linux does. ``echo``: ports on which what comes is sent back, and an end with a close.

    ``others``: ports on which connections are taken and left to the test, in ``peers`` by (guest port, host port).
    """

    def __init__(self, echo: frozenset[int] = frozenset(), others: frozenset[int] = frozenset(), room: int = 65536):
        super().__init__()
        self.echo, self.others, self.room = echo, others, room
        self.peers: dict[tuple[int, int], Peer] = {}
        self.answers_close = True
        self.resets = 0

    def connect(self, guest_port: int, host_port: int) -> Peer:
        peer = self.peers[guest_port, host_port] = Peer(self.room)
        self.say(OP_REQUEST, (guest_port, host_port), peer)
        return peer

    def close(self, key: tuple[int, int]) -> None:
        self.say(OP_SHUTDOWN, key, self.peers[key], flags=SHUTDOWN_BOTH)

    def say(self, op: int, key: tuple[int, int], peer: Peer, payload: bytes = b"", flags: int = 0) -> None:
        credit = {"buf_alloc": peer.room, "fwd_cnt": peer.taken % 2**32}
        self.send(op, *key, payload, flags=flags, **credit)

    def step(self) -> bool:
        """Take what came, do what is due; whether there was anything."""
        packets = self.receive()
        for packet in packets:
            self._take(packet)
        worked = [key for key, peer in list(self.peers.items()) if self._work(key, peer)]
        return bool(packets or worked)

    def settle(self) -> None:
        while self.step():
            pass

    def _take(self, packet: Packet) -> None:
        head = packet.header
        key = (head.dst_port, head.src_port)
        if head.op == OP_REQUEST and head.dst_port in self.echo | self.others and key not in self.peers:
            peer = self.peers[key] = Peer(self.room, established=True)
            self._note(peer, head)
            self.say(OP_RESPONSE, key, peer)
        elif key not in self.peers or self.peers[key].over:
            if head.op != OP_RST:
                self.send(OP_RST, *key)
        else:
            self._take_for(key, self.peers[key], packet)

    def _note(self, peer: Peer, head: Header) -> None:
        peer.host_room, peer.host_taken = head.buf_alloc, head.fwd_cnt

    def _take_for(self, key: tuple[int, int], peer: Peer, packet: Packet) -> None:
        head = packet.header
        self._note(peer, head)
        if head.op == OP_RESPONSE:
            peer.established = True
        elif head.op == OP_RST:
            peer.over = True
            self.resets += 1
        elif head.op == OP_RW:
            peer.buffered += packet.payload
            assert len(peer.buffered) <= peer.room, "the host went beyond its credit"
        elif head.op == OP_CREDIT_REQUEST:
            self.say(OP_CREDIT_UPDATE, key, peer)
        elif head.op == OP_SHUTDOWN:
            peer.ended_by_host = True
            if head.flags == SHUTDOWN_BOTH and self.answers_close:
                peer.got += peer.buffered
                peer.over = True
                self.say(OP_RST, key, peer)

    def _work(self, key: tuple[int, int], peer: Peer) -> bool:
        if peer.over or not peer.established:
            return False
        read = self._read(key, peer)
        return self._write(key, peer) or read

    def _read(self, key: tuple[int, int], peer: Peer) -> bool:
        if not (peer.reading and peer.buffered):
            return False
        data = bytes(peer.buffered)
        peer.buffered.clear()
        peer.taken += len(data)
        if key[0] in self.echo:
            peer.to_send += data
        else:
            peer.got += data
        self.say(OP_CREDIT_UPDATE, key, peer)
        return True

    def _write(self, key: tuple[int, int], peer: Peer) -> bool:
        free = peer.host_room - (peer.sent - peer.host_taken) % 2**32
        data = bytes(peer.to_send[: min(free, 65536)])
        if data:
            del peer.to_send[: len(data)]
            peer.sent += len(data)
            self.say(OP_RW, key, peer, data)
        elif not peer.to_send and (peer.close_when_sent or (key[0] in self.echo and peer.ended_by_host)):
            peer.over = True
            self.say(OP_SHUTDOWN, key, peer, flags=SHUTDOWN_BOTH)
        elif not peer.to_send and peer.half_close_when_sent:
            peer.half_close_when_sent = False
            self.say(OP_SHUTDOWN, key, peer, flags=SHUTDOWN_SEND)
        return bool(data)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Steps of the kernel, between the turns of the loop."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:  # noqa: ASYNC110 (a guest has a clock of its own)
            await asyncio.sleep(0 if self.step() else 0.001)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 (and nobody tells what it does)
                await asyncio.sleep(0.001)
