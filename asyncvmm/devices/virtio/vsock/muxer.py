"""All connections of one guest: who gets a packet, and whose packet is next.

Bounded whatever the guest does: the number of connections that are not yet released by the host, the bytes of their
receive buffers together, and the RST answers to packets that belong to no connection.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from asyncvmm.devices.virtio.vsock.connection import Connection, Key, Payload, ProtocolViolation, State
from asyncvmm.devices.virtio.vsock.packet import (
    HOST_CID,
    OP_REQUEST,
    OP_RST,
    TYPE_STREAM,
    Header,
)
from asyncvmm.metrics.groups import VsockMetrics

MAX_CONNECTIONS: Final = 1024
"""Connections at a time, those counted that the guest has ended and the host not yet closed."""

MAX_KNOWN: Final = 2 * MAX_CONNECTIONS
"""Those included that the host has released, until the guest has confirmed it, or fetched the RST that tells it."""

BUFFER: Final = 256 * 1024
"""Receive buffer of a connection; Linux' own default."""

SMALL_BUFFER: Final = 32 * 1024
"""Receive buffer of one that finds the generous part of the memory taken."""

GENEROUS_MEMORY: Final = 32 * 1024 * 1024
"""Bytes of receive buffers after which new connections get small ones: 64 MiB at most for all of them."""

MAX_REPLIES: Final = 256
"""RST answers that may wait; with as many, no packet of the guest's is taken until some have gone."""

EPHEMERAL: Final = (1 << 30, 1 << 31)
"""Host ports for connections that the host begins: from the first, below the second."""


class TooManyConnections(Exception):
    """There are MAX_CONNECTIONS already, or MAX_KNOWN with those that the guest is slow to forget."""


class Backend(Protocol):
    """Who answers for the host's ports."""

    def requested(self, connection: Connection) -> None:
        """The guest asks for a connection: ``accept`` or ``abort`` it, now or later, and ``release`` it in the end."""


class Muxer:
    """The connections of the guest ``guest_cid``. To be used under the device's lock."""

    def __init__(self, guest_cid: int, metrics: VsockMetrics) -> None:
        self.guest_cid = guest_cid
        self.backend: Backend | None = None
        self._metrics = metrics
        self._connections: dict[Key, Connection] = {}
        self._ready: dict[Connection, None] = {}
        self._replies: deque[Header] = deque()
        self._held = 0
        self._buffers = 0
        self._next_port = EPHEMERAL[0]

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def held(self) -> int:
        """Connections that the host has not released."""
        return self._held

    @property
    def is_full(self) -> bool:
        """Whether the guest has to fetch packets before more of its own are taken."""
        return len(self._replies) >= MAX_REPLIES

    @property
    def has_packet(self) -> bool:
        """Whether there is a packet for the guest."""
        return bool(self._replies or self._ready)

    @property
    def _has_enough(self) -> bool:
        return self._held >= MAX_CONNECTIONS or len(self._connections) >= MAX_KNOWN

    # -- the host's half -----------------------------------------------------------------------------------------------

    def connect(self, port: int) -> Connection:
        """Ask the guest for a connection to its ``port``. Raises TooManyConnections."""
        if self._has_enough:
            raise TooManyConnections
        return self._add((self._ephemeral_port(port), port), None)

    def release(self, connection: Connection) -> None:
        """The host will not look at it any more: it is closed, unless that was done, and its memory given back."""
        if connection.released:
            return
        connection.released = True
        connection.close()
        self._settle(connection)
        self._held -= 1
        self._buffers -= connection.buf_alloc

    def kill(self, connection: Connection) -> None:
        """End it by force."""
        if connection.state is not State.CLOSED:
            self._metrics.conns_killed += 1
            connection.abort()
        self._settle(connection)

    def reset(self) -> None:
        """The guest's driver has gone: so have all connections, but for requests that no guest has seen yet."""
        self._replies.clear()
        for connection in list(self._connections.values()):
            if not connection.is_unknown_to_guest:
                connection.forget()
                self._settle(connection)

    # -- packets of the guest ------------------------------------------------------------------------------------------

    def is_addressed(self, header: Header) -> bool:
        """Whether the packet goes from this guest to the host; any other is nobody's (5.10.4)."""
        return header.src_cid == self.guest_cid and header.dst_cid == HOST_CID

    def receive(self, header: Header, payload: Payload) -> None:
        """Take a packet that ``is_addressed``."""
        self._metrics.tx_packets_count += 1
        self._metrics.tx_bytes_count += len(payload)
        connection = self._connections.get((header.dst_port, header.src_port))
        if header.type != TYPE_STREAM:
            self._refuse(header)
        elif connection is not None:
            self._receive_for(connection, header, payload)
        elif header.op == OP_REQUEST:
            self._receive_request(header)
        else:
            self._refuse(header)

    def _receive_for(self, connection: Connection, header: Header, payload: Payload) -> None:
        try:
            connection.receive(header, payload)
        except ProtocolViolation:
            self._metrics.conn_event_fails += 1
            self.kill(connection)
        self._settle(connection)

    def _receive_request(self, header: Header) -> None:
        if self.backend is None or self._has_enough:
            self._refuse(header)
            return
        connection = self._add((header.dst_port, header.src_port), header)
        self.backend.requested(connection)
        self._settle(connection)

    def _refuse(self, header: Header) -> None:
        """Answer with RST, but never an RST (5.10.6.7): two that know of nothing would go on for ever."""
        if header.op == OP_RST:
            return
        self._metrics.conn_event_fails += 1
        reply = Header(HOST_CID, self.guest_cid, header.dst_port, header.src_port, 0, header.type, OP_RST, 0, 0, 0)
        self._replies.append(reply)

    # -- packets for the guest -----------------------------------------------------------------------------------------

    def next_packet(self, space: int) -> tuple[Header, memoryview] | None:
        """A packet with a payload of at most ``space`` bytes; each connection has its turn. None if there is none."""
        packet = self._next_reply() if self._replies else self._next_of_connections(space)
        if packet is not None:
            self._metrics.rx_packets_count += 1
            self._metrics.rx_bytes_count += len(packet[1])
        return packet

    def _next_reply(self) -> tuple[Header, memoryview]:
        return self._replies.popleft(), memoryview(b"")

    def _next_of_connections(self, space: int) -> tuple[Header, memoryview] | None:
        while self._ready:
            connection = next(iter(self._ready))
            del self._ready[connection]
            packet = connection.next_packet(space)
            if packet is not None:
                if connection.next_op():
                    self._ready[connection] = None
                else:
                    self._settle(connection)
                return packet
        return None

    @property
    def only_sender(self) -> Connection | None:
        """The connection that has a packet for the guest, if there is but one, and no answer waits."""
        return next(iter(self._ready)) if len(self._ready) == 1 and not self._replies else None

    def note_sent(self, connection: Connection, packets: int, size: int) -> None:
        """So many packets of the one that was ``only_sender`` have gone, with so much of what was sendable."""
        self._metrics.rx_packets_count += packets
        self._metrics.rx_bytes_count += size
        connection.note_sent(size)
        if not connection.next_op():
            self._ready.pop(connection, None)

    # -- who there is --------------------------------------------------------------------------------------------------

    def _add(self, key: Key, request: Header | None) -> Connection:
        buffer = BUFFER if self._buffers < GENEROUS_MEMORY else SMALL_BUFFER
        self._held += 1
        self._buffers += buffer
        self._metrics.conns_added += 1
        connection = Connection(key, self.guest_cid, buffer, request, self._mark_ready)
        self._connections[key] = connection
        return connection

    def _mark_ready(self, connection: Connection) -> None:
        self._ready[connection] = None

    def _settle(self, connection: Connection) -> None:
        """Forget a connection that has ended; one with an RST to send is remembered until that has gone."""
        if connection.state is not State.CLOSED or self._connections.get(connection.key) is not connection:
            return
        if not connection.next_op():
            del self._connections[connection.key]
            self._ready.pop(connection, None)
            self._metrics.conns_removed += 1

    def _ephemeral_port(self, peer_port: int) -> int:
        first, behind = EPHEMERAL
        while True:
            port = self._next_port
            self._next_port = port + 1 if port + 1 < behind else first
            if (port, peer_port) not in self._connections:
                return port
