"""The messages of vhost-user, to the back end and back. Sans-I/O; facts: docs/interop/vhost-user.rst of QEMU.

A message is a header of 12 bytes, a payload, and descriptors that travel beside it. What comes is checked as anything
that comes from another process: a QEMU may have been taken over by its guest.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import attrs

HEADER_SIZE: Final = 12
MAX_PAYLOAD: Final = 4096
MAX_REGIONS: Final = 8
"""Memory regions in one table, and so descriptors beside one message."""

VERSION: Final = 1
VERSION_MASK: Final = 3
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

F_PROTOCOL_FEATURES: Final = 30
"""VHOST_USER_F_PROTOCOL_FEATURES, a bit among the virtio features."""

PROTOCOL_F_MQ: Final = 0
PROTOCOL_F_REPLY_ACK: Final = 3
PROTOCOL_F_CONFIG: Final = 9

VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 1 << 8


class Request(IntEnum):
    """What the front end may ask of this back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class VhostUserError(Exception):
    """The front end said what it must not; the text names the fact. The connection ends."""


@attrs.frozen
class Message:
    """One message. ``descriptors`` belong to who takes it."""

    request: int
    flags: int
    payload: bytes = b""
    descriptors: tuple[int, ...] = ()

    @property
    def needs_reply(self) -> bool:
        """Whether the front end waits to hear how it went."""
        return bool(self.flags & FLAG_NEED_REPLY)


class Decoder:
    """Puts messages together. Never read more than ``wanted`` bytes: the next message's descriptors come with its
    first byte."""

    def __init__(self) -> None:
        self._data = b""
        self._descriptors: tuple[int, ...] = ()
        self._size = HEADER_SIZE

    @property
    def wanted(self) -> int:
        """Bytes missing to the header's end, or to the message's."""
        return self._size - len(self._data)

    def feed(self, data: bytes, descriptors: tuple[int, ...] = ()) -> Message | None:
        """At most ``wanted`` bytes, and what came beside them; the message if it is whole. Raises VhostUserError."""
        self._data += data
        self._descriptors += descriptors
        if len(self._descriptors) > MAX_REGIONS:
            raise VhostUserError(f"{len(self._descriptors)} descriptors beside a message")
        if self._size == HEADER_SIZE == len(self._data):
            self._read_header()
        return self._finish() if not self.wanted else None

    def take_descriptors(self) -> tuple[int, ...]:
        """Those of a message that is not whole, to be closed."""
        found, self._descriptors = self._descriptors, ()
        return found

    def _read_header(self) -> None:
        _, flags, size = struct.unpack("<III", self._data)
        if flags & VERSION_MASK != VERSION or flags & FLAG_REPLY:
            raise VhostUserError(f"a message with flags {flags:#x}")
        if size > MAX_PAYLOAD:
            raise VhostUserError(f"a payload of {size} bytes")
        self._size = HEADER_SIZE + size

    def _finish(self) -> Message:
        request, flags, _ = struct.unpack_from("<III", self._data)
        message = Message(request, flags, self._data[HEADER_SIZE:], self.take_descriptors())
        self._data, self._size = b"", HEADER_SIZE
        return message


def reply(request: int, payload: bytes) -> bytes:
    """The answer to a request, as it goes over the wire."""
    return struct.pack("<III", request, VERSION | FLAG_REPLY, len(payload)) + payload


# -- payloads ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Region:
    """Guest RAM from ``guest_address`` on, at ``user_address`` in QEMU, at ``offset`` of its descriptor's file."""

    guest_address: int
    size: int
    user_address: int
    offset: int


@attrs.frozen
class RingAddresses:
    """Where a ring is, in QEMU's own addresses."""

    descriptors: int
    used: int
    available: int


def encode_u64(value: int) -> bytes:
    """A payload of one number."""
    return struct.pack("<Q", value)


def decode_u64(payload: bytes) -> int:
    """Raises VhostUserError."""
    (value,) = _unpack("<Q", payload)
    return value


def encode_state(index: int, value: int) -> bytes:
    """A vring state."""
    return struct.pack("<II", index, value)


def decode_state(payload: bytes) -> tuple[int, int]:
    """A vring state: ring and number. Raises VhostUserError."""
    index, value = _unpack("<II", payload)
    return index, value


def decode_addresses(payload: bytes) -> tuple[int, RingAddresses]:
    """A vring address: ring and its addresses; the dirty log is not offered. Raises VhostUserError."""
    index, _, descriptors, used, available, _ = _unpack("<IIQQQQ", payload)
    return index, RingAddresses(descriptors, used, available)


def decode_regions(payload: bytes) -> list[Region]:
    """A memory table. Raises VhostUserError."""
    if len(payload) < 8:
        raise VhostUserError(f"a memory table of {len(payload)} bytes")
    count, _ = struct.unpack_from("<II", payload)
    if not 0 < count <= MAX_REGIONS or len(payload) != 8 + 32 * count:
        raise VhostUserError(f"a memory table of {count} regions in {len(payload)} bytes")
    regions = [Region(*struct.unpack_from("<QQQQ", payload, 8 + 32 * number)) for number in range(count)]
    for region in regions:
        ends = (region.guest_address + region.size, region.user_address + region.size, region.offset + region.size)
        if not region.size or max(ends) >= 1 << 64:
            raise VhostUserError(f"a memory region of {region.size:#x} bytes at {region.guest_address:#x}")
    return regions


def decode_config(payload: bytes) -> tuple[int, int, bytes]:
    """A read or write of the configuration space: offset, size, and the bytes. Raises VhostUserError."""
    if len(payload) < 12:
        raise VhostUserError(f"a configuration message of {len(payload)} bytes")
    offset, size, _ = struct.unpack_from("<III", payload)
    if len(payload) != 12 + size:
        raise VhostUserError(f"{size} bytes of configuration in a message of {len(payload)}")
    return offset, size, payload[12:]


def encode_config(offset: int, data: bytes) -> bytes:
    """What the configuration space holds there."""
    return struct.pack("<III", offset, len(data), 0) + data


def _unpack(layout: str, payload: bytes) -> tuple[int, ...]:
    if len(payload) != struct.calcsize(layout):
        raise VhostUserError(f"a payload of {len(payload)} bytes instead of {struct.calcsize(layout)}")
    return struct.unpack(layout, payload)
