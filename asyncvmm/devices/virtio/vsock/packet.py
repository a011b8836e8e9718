"""The packet header of the socket device: virtio 1.2, section 5.10.6; names as in the kernel's virtio_vsock.h."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

HOST_CID: Final = 2
"""The host's address."""

TYPE_STREAM: Final = 1
"""VIRTIO_VSOCK_TYPE_STREAM, the one type spoken here."""

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

SHUTDOWN_RCV: Final = 1
"""The sender of the packet will receive no more."""

SHUTDOWN_SEND: Final = 2
"""The sender of the packet will send no more."""

SHUTDOWN_BOTH: Final = SHUTDOWN_RCV | SHUTDOWN_SEND

EVENT_TRANSPORT_RESET: Final = 0
"""VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: every connection is gone, and guest_cid may have changed."""

MAX_PAYLOAD: Final = 64 * 1024
"""Most bytes of one packet; Linux sends no more (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)."""

_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = _HEADER.size


class Header(NamedTuple):
    """struct virtio_vsock_hdr. ``len`` is the payload's bytes; ``buf_alloc`` and ``fwd_cnt`` are the sender's credit
    fields: the size of its receive buffer, and how many bytes have left it so far (modulo 2^32).

    A tuple, for one is made of every packet: struct gives and takes tuples.
    """

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Header:
        """From the first HEADER_SIZE bytes of ``data``. Any bytes are a header; what they say is for others to judge.

        Raises struct.error for fewer bytes.
        """
        return cls._make(_HEADER.unpack_from(data))

    def encode(self) -> bytes:
        """As it goes over the wire."""
        return _HEADER.pack(*self)
