"""One stream connection between a host port and a guest port, as a state machine: virtio 1.2, section 5.10.6.

Both sides count payload bytes modulo 2^32. What a side may have under way is the other's ``buf_alloc``, less what it
sent (``tx_cnt``) and the other has not yet taken out of its buffer (``fwd_cnt``).

    REQUESTED ──RESPONSE──▶ ESTABLISHED ◀──accept()── PENDING       REQUESTED: the host asked, the guest has to answer
        │                    │       │                   │          PENDING: the guest asked, the host has to answer
        │ RST             close()   RST, SHUTDOWN       reject()    CLOSING: the host closed, the guest has to confirm
        ▼                    ▼       ▼                   ▼
      CLOSED ◀──────RST── CLOSING   CLOSED             CLOSED

What waits to be sent is a handful of flags and the caller's own data, never a queue: a guest that offers no receive
buffers makes nothing grow. What the guest sent is kept until the host takes it, at most ``buf_alloc`` bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from asyncvmm.devices.virtio.vsock.packet import (
    HOST_CID,
    MAX_PAYLOAD,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
)

WRAP: Final = 2**32
_NOTHING: Final = memoryview(b"")

Key = tuple[int, int]
"""A connection's (local port, peer port): the host's and the guest's."""


Payload = bytes | memoryview


class ProtocolViolation(Exception):
    """The guest sent what the connection's state, or its credit, does not allow."""


class State(Enum):
    """Where a connection stands; see the drawing above."""

    REQUESTED = "requested"
    PENDING = "pending"
    ESTABLISHED = "established"
    CLOSING = "closing"
    CLOSED = "closed"


# An enumeration's members are slow to look up.
_REQUESTED, _PENDING, _ESTABLISHED, _CLOSING, _CLOSED = State


def _ignore(_: object = None) -> None:
    pass


class Connection:
    """One connection.

    ``incoming`` is what the guest sent and the host has not taken; ``outgoing`` what the host offered and the guest
    has not got; ``unsent`` is how many bytes of it were not sent, also where the offer has come to nothing since.
    ``observer`` is called when something changed that the host may be waiting for; ``on_ready`` when there is a packet
    to fetch by ``next_packet``. ``sink``, where there is one, is offered what the guest sends while nothing waits in
    ``incoming``, as a view of guest RAM, and says how many bytes it took. The methods of the host's half are to be
    called under the device's lock, like all others.
    """

    __slots__ = (
        "_credit_requested",
        "_credit_update",
        "_fwd_cnt",
        "_local_shutdown",
        "_on_ready",
        "_open_op",
        "_peer_buf_alloc",
        "_peer_fwd_cnt",
        "_rst",
        "_sent_fwd_cnt",
        "_shutdown",
        "_tx_cnt",
        "buf_alloc",
        "guest_cid",
        "incoming",
        "key",
        "observer",
        "outgoing",
        "peer_shutdown",
        "released",
        "sink",
        "state",
        "unsent",
    )

    def __init__(
        self,
        key: Key,
        guest_cid: int,
        buf_alloc: int,
        request: Header | None = None,
        on_ready: Callable[[Connection], None] = _ignore,
    ) -> None:
        """``request``: the guest's, which the host has to accept or reject; None if the host asks."""
        self.key = key
        self.guest_cid = guest_cid
        self.buf_alloc = buf_alloc
        self.incoming = bytearray()
        self.outgoing = _NOTHING
        self.unsent = 0
        self.observer: Callable[[], None] = _ignore
        self.sink: Callable[[Payload], int] | None = None
        self.peer_shutdown = 0
        self.released = False
        self._on_ready = on_ready
        self._tx_cnt = self._fwd_cnt = self._sent_fwd_cnt = 0
        self._peer_buf_alloc = request.buf_alloc if request else 0
        self._peer_fwd_cnt = request.fwd_cnt if request else 0
        self._open_op = 0 if request else OP_REQUEST
        self._local_shutdown = 0
        self._shutdown = self._rst = self._credit_update = self._credit_requested = False
        self.state = _PENDING if request else _REQUESTED
        self._tell_if_ready()

    # -- what the host can know ----------------------------------------------------------------------------------------

    @property
    def local_port(self) -> int:
        """The host's port."""
        return self.key[0]

    @property
    def peer_port(self) -> int:
        """The guest's port."""
        return self.key[1]

    @property
    def at_end(self) -> bool:
        """Whether the guest ended its stream in order and all of it was taken."""
        return bool(self.peer_shutdown & SHUTDOWN_SEND) and not self.incoming

    @property
    def can_send(self) -> bool:
        """Whether the guest may still take what is offered."""
        receiving = not (self.peer_shutdown & SHUTDOWN_RCV or self._local_shutdown & SHUTDOWN_SEND)
        return self.state is _ESTABLISHED and receiving

    @property
    def is_unknown_to_guest(self) -> bool:
        """Whether no packet of it has been given to the guest."""
        return self.state is _REQUESTED and self._open_op == OP_REQUEST

    @property
    def peer_free(self) -> int:
        """Bytes the guest has room for."""
        free = self._peer_buf_alloc - (self._tx_cnt - self._peer_fwd_cnt) % WRAP
        return free if free > 0 else 0

    # -- the host's half -----------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """Answer the guest's request with yes; nothing if it does not wait for an answer any more."""
        if self.state is _PENDING:
            self.state = _ESTABLISHED
            self._open_op = OP_RESPONSE
            self._tell_if_ready()

    def offer(self, data: memoryview) -> None:
        """Bytes for the guest, taken as it has room; nothing may be on offer already. Where ``can_send`` does not hold
        it comes to nothing at once."""
        self.unsent = len(data)
        if self.can_send:
            self.outgoing = data
            self._tell_if_ready()

    def withdraw(self) -> None:
        """Take back what is still on offer."""
        self.outgoing = _NOTHING

    def take(self, size: int) -> bytes:
        """At most ``size`` bytes of what the guest sent; room for as many is the guest's again."""
        data = bytes(self.incoming) if size >= len(self.incoming) else bytes(memoryview(self.incoming)[:size])
        self.drop(len(data))
        return data

    def drop(self, size: int) -> None:
        """The host has taken the first ``size`` bytes of what the guest sent: room for as many is the guest's again."""
        del self.incoming[:size]
        self._count_taken(size)
        if self._credit_update:
            self._tell_if_ready()

    def _count_taken(self, size: int) -> None:
        self._fwd_cnt = (self._fwd_cnt + size) % WRAP
        untold = (self._fwd_cnt - self._sent_fwd_cnt) % WRAP
        if untold * 2 >= self.buf_alloc:
            self._credit_update = True

    def finish_sending(self) -> None:
        """Tell the guest that no more will come. May be called again."""
        self._shut(SHUTDOWN_SEND)

    def finish_receiving(self) -> None:
        """Tell the guest that no more is wanted. What it sends nevertheless has to be taken. May be called again."""
        self._shut(SHUTDOWN_RCV)

    def close(self) -> None:
        """The host wants no more of it: shut down in order where it was established, refused or reset elsewhere."""
        self.withdraw()
        self.incoming.clear()
        if self.state is _ESTABLISHED:
            self._shut(SHUTDOWN_BOTH)
            self.state = _CLOSING
        elif self.state is not _CLOSING:
            self.abort()

    def abort(self) -> None:
        """End it at once; the guest gets RST if it knows of it."""
        if self.state is not _CLOSED:
            self._end(rst=not self.is_unknown_to_guest)

    def forget(self) -> None:
        """The guest was reset: end it without a word."""
        self._end(rst=False)

    # -- the guest's half ----------------------------------------------------------------------------------------------

    def receive(self, header: Header, payload: Payload) -> None:
        """A packet of the guest's for this connection. Raises ProtocolViolation."""
        if self.state is _CLOSED:
            self._rst = self._rst and header.op != OP_RST  # what crossed our RST needs no other
            return
        self._peer_buf_alloc, self._peer_fwd_cnt = header.buf_alloc, header.fwd_cnt
        if self._credit_requested and self.peer_free:
            # Not for any answer: a guest that answers "no room" would be asked again at once, for ever.
            self._credit_requested = False
        if header.op == OP_RW:
            self._receive_data(payload)
        elif header.op == OP_RST:
            self._end(rst=False)
        elif header.op == OP_SHUTDOWN:
            self._receive_shutdown(header.flags)
        elif header.op == OP_RESPONSE and self.state is _REQUESTED and not self._open_op:
            self.state = _ESTABLISHED
            self.observer()
        elif header.op == OP_CREDIT_REQUEST:
            self._credit_update = True
        elif header.op != OP_CREDIT_UPDATE:
            raise ProtocolViolation(f"operation {header.op} while {self.state.value}")
        self._tell_if_ready()

    def _receive_data(self, payload: Payload) -> None:
        if self.state is _CLOSING:
            return
        if self.state is not _ESTABLISHED or self.peer_shutdown & SHUTDOWN_SEND:
            raise ProtocolViolation(f"data while {self.state.value}, shut down {self.peer_shutdown}")
        if len(self.incoming) + len(payload) > self.buf_alloc:
            raise ProtocolViolation(f"{len(payload)} bytes beyond the credit of {self.buf_alloc}")
        if self.sink is not None and not self.incoming:
            taken = self.sink(payload)
            self._count_taken(taken)
            if taken == len(payload):
                return
            payload = payload[taken:]
        self.incoming += payload
        self.observer()

    def _receive_shutdown(self, flags: int) -> None:
        self.peer_shutdown |= flags & SHUTDOWN_BOTH
        if self.peer_shutdown & SHUTDOWN_RCV:
            self.withdraw()
        if self.peer_shutdown == SHUTDOWN_BOTH:
            self._end(rst=True)
        else:
            self.observer()

    # -- packets for the guest -----------------------------------------------------------------------------------------

    def next_op(self) -> int:
        """The operation of the next packet for the guest; 0 if there is none."""
        if self._rst:
            return OP_RST
        if self._open_op:
            return self._open_op
        if self.state not in (_ESTABLISHED, _CLOSING):
            return 0
        if self.outgoing and (self._tx_cnt - self._peer_fwd_cnt) % WRAP < self._peer_buf_alloc:  # peer_free
            return OP_RW
        if self._credit_update:
            return OP_CREDIT_UPDATE
        if self.outgoing:
            return 0 if self._credit_requested else OP_CREDIT_REQUEST
        return OP_SHUTDOWN if self._shutdown else 0

    def next_packet(self, space: int) -> tuple[Header, memoryview] | None:
        """The next packet, its payload at most ``space`` bytes; None if there is none."""
        op, payload = self.next_op(), _NOTHING
        if not op:
            return None
        flags = self._local_shutdown if op == OP_SHUTDOWN else 0
        if op == OP_RW:
            payload = self._next_payload(space)
        self._note_sent(op)
        header = self._header(op, len(payload), flags)
        if op == OP_RW and not self.outgoing:
            self.observer()
        return header, payload

    def _next_payload(self, space: int) -> memoryview:
        payload = self.outgoing[: min(space, self.peer_free, MAX_PAYLOAD)]
        self._count_sent(len(payload))
        return payload

    def _count_sent(self, size: int) -> None:
        self.outgoing = self.outgoing[size:]
        self.unsent -= size
        self._tx_cnt = (self._tx_cnt + size) % WRAP

    def sendable(self) -> memoryview:
        """Data that can be sent now, in packets with ``data_header``; say by ``note_sent`` how much of it was."""
        return self.outgoing[: self.peer_free] if self.next_op() == OP_RW else _NOTHING

    def data_header(self, size: int) -> Header:
        """Of a packet with so many bytes."""
        return self._header(OP_RW, size, 0)

    def note_sent(self, size: int) -> None:
        """The first bytes of what was sendable have gone."""
        self._count_sent(size)
        self._note_sent(OP_RW)
        if not self.outgoing:
            self.observer()

    def _note_sent(self, op: int) -> None:
        if op in (OP_REQUEST, OP_RESPONSE):
            self._open_op = 0
        elif op == OP_RST:
            self._rst = False
        elif op == OP_SHUTDOWN:
            self._shutdown = False
        elif op == OP_CREDIT_REQUEST:
            self._credit_requested = True
        self._credit_update = False
        self._sent_fwd_cnt = self._fwd_cnt

    def _header(self, op: int, size: int, flags: int) -> Header:
        local, peer = self.key
        return Header(
            HOST_CID, self.guest_cid, local, peer, size, TYPE_STREAM, op, flags, self.buf_alloc, self._fwd_cnt
        )

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _shut(self, flags: int) -> None:
        if self._local_shutdown | flags != self._local_shutdown:
            self._local_shutdown |= flags
            self._shutdown = True
            self._tell_if_ready()

    def _end(self, *, rst: bool) -> None:
        self.state = _CLOSED
        self._rst = rst
        self._open_op = 0
        self.withdraw()
        self._tell_if_ready()
        self.observer()

    def _tell_if_ready(self) -> None:
        if self.next_op():
            self._on_ready(self)
