"""The socket device under attack: connections are asked for, answered, used and ended in any order, on both sides."""

from __future__ import annotations

from asyncvmm.devices.virtio.vsock import muxer as muxing
from asyncvmm.devices.virtio.vsock.connection import Connection, State
from asyncvmm.devices.virtio.vsock.device import EVENT, RX, TX, VirtioVsock
from asyncvmm.devices.virtio.vsock.muxer import TooManyConnections
from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, HOST_CID, OP_REQUEST, OP_RST, OP_RW, TYPE_STREAM, Header
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.limits import lowered
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

CID = 7
MOST = 6
BUFFER = 128
REPLIES = 4
_ACCEPTED, _REFUSED, _LATER = range(3)


class VsockTarget(Target):
    """The device and a host, which answers by the port: some it accepts, some it refuses, some it puts off."""

    device: VirtioVsock

    def __init__(self) -> None:
        self.connections: list[Connection] = []

    def make(self, script: Script) -> VirtioVsock:
        """See Target."""
        for connection in self.connections:
            self.device.muxer.release(connection)
        self.connections = []
        self.device = VirtioVsock(CID, VsockMetrics())
        self.device.muxer.backend = self
        return self.device

    def requested(self, connection: Connection) -> None:
        """See muxer.Backend."""
        assert connection.state is State.PENDING
        kind = connection.local_port % 3
        if kind == _ACCEPTED:
            connection.accept()
        if kind == _REFUSED:
            self.device.muxer.release(connection)
        else:
            self.connections.append(connection)

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        if index == RX:
            return [], [script.pick((HEADER_SIZE + 64, HEADER_SIZE + 4096, HEADER_SIZE, 4))]
        if index == EVENT:
            return [], [script.pick((4, 8, 3))]
        ports = (script.byte() % 6, script.byte() % 64)
        if self.connections and script.flag():
            ports = script.pick(self.connections).key
        payload = script.data(script.byte()) if script.flag() else b""
        header = Header(
            src_cid=CID if script.byte() % 16 else script.number(8),
            dst_cid=HOST_CID if script.byte() % 16 else script.number(8),
            src_port=ports[1],
            dst_port=ports[0],
            len=len(payload) if script.byte() % 8 else script.number(4),
            type=TYPE_STREAM if script.byte() % 16 else script.number(2),
            op=script.byte() % 9,
            flags=script.byte() % 4,
            buf_alloc=script.size(),
            fwd_cnt=script.size(),
        ).encode()
        if script.flag():
            return [header + payload], []
        return [header[:20], header[20:], *[payload] * bool(payload)], []

    def event(self, script: Script) -> None:
        """What VsockHost and its streams do."""
        kind = script.byte() % 8
        connection = script.pick(self.connections) if self.connections else None
        with self.device.host() as muxer:
            if kind == 0:
                try:
                    self.connections.append(muxer.connect(script.byte() % 64))
                except TooManyConnections:
                    assert muxer.held == MOST or len(muxer) == 2 * MOST
            elif connection is None:
                pass
            elif kind == 1:
                connection.accept()
            elif kind == 2:
                taken = connection.take(script.byte())
                assert len(taken) <= BUFFER
            elif kind == 3:
                if connection.can_send and not connection.outgoing:
                    connection.offer(memoryview(script.data(script.size() % 5000)))
            elif kind == 4:
                connection.finish_sending()
            elif kind == 5:
                connection.withdraw()
            else:
                self._end(connection, by_force=kind == 6)

    def _end(self, connection: Connection, *, by_force: bool) -> None:
        if by_force:
            self.device.muxer.kill(connection)
        self.connections.remove(connection)
        self.device.muxer.release(connection)

    def check(self) -> None:
        """What a guest can make the host remember is bounded."""
        muxer = self.device.muxer
        assert muxer.held == len(self.connections) <= MOST
        assert len(muxer) <= 2 * MOST, "connections pile up"
        assert len(muxer._replies) <= 2 * REPLIES
        assert set(muxer._ready) <= set(muxer._connections.values()), "a connection that is gone has something to say"
        assert muxer._buffers == sum(connection.buf_alloc for connection in self.connections)
        for connection in self.connections:
            assert len(connection.incoming) <= connection.buf_alloc <= BUFFER

    def may_wait(self, index: int) -> bool:
        """Buffers wait for packets, and packets for buffers."""
        return index in (RX, EVENT) or self.device.muxer.is_full

    def serves(self, driver: Driver) -> None:
        """A connection is made, and carries what is sent."""
        with self.device.host():
            for connection in self.connections:
                self.device.muxer.release(connection)
            self.connections.clear()
        for _ in range(12):
            driver.send(RX, writable=[HEADER_SIZE + 64])
        driver.request(TX, [self._packet(OP_REQUEST)])
        driver.request(TX, [self._packet(OP_RW, b"hello")])
        (connection,) = self.connections
        with self.device.host():
            assert connection.take(5) == b"hello"
            connection.offer(memoryview(b"world"))
        data = [used.data for used in driver.used(RX)]
        assert data[-1][HEADER_SIZE:] == b"world"
        driver.request(TX, [self._packet(OP_RST)])
        assert connection.state is State.CLOSED

    def _packet(self, op: int, payload: bytes = b"") -> bytes:
        cid, port = self.device.muxer.guest_cid, 4000 * 3
        return Header(cid, HOST_CID, 5000, port, len(payload), TYPE_STREAM, op, 0, 4096, 0).encode() + payload


def run(data: bytes) -> None:
    """One script."""
    limits = {
        "MAX_CONNECTIONS": MOST,
        "MAX_KNOWN": 2 * MOST,
        "BUFFER": BUFFER,
        "SMALL_BUFFER": BUFFER // 2,
        "MAX_REPLIES": REPLIES,
    }
    with lowered(muxing, GENEROUS_MEMORY=4 * BUFFER, **limits):
        play(VsockTarget(), data)
