"""Ethernet frames in a byte stream, as QEMU's stream sockets carry them: a length, four bytes big-endian, and a frame.

The framing is that of ``-netdev stream`` (QEMU, net/stream.c), which passt and gvproxy speak. Nothing is copied beyond
what the reader puts into the buffer, and the buffer never grows.
"""

from __future__ import annotations

import struct
from typing import Final

from asyncvmm.errors import MachineError

MAX_FRAME: Final = 65535 + 14 + 4
"""Bytes of the longest frame: the longest IP packet behind an Ethernet header with a VLAN tag."""

CAPACITY: Final = 256 * 1024
"""Bytes read ahead at the most."""

_LENGTH: Final = struct.Struct(">I")


class FramingError(MachineError):
    """The peer's bytes are no frames; there is no way back into step."""


def prefix(size: int) -> bytes:
    """What goes before a frame of ``size`` bytes."""
    return _LENGTH.pack(size)


class FrameBuffer:
    """Bytes as they come, frames once complete: ``space`` and ``fed`` to fill it, ``peek`` and ``skip`` to empty it.

    capacity: its bytes; it must hold the longest frame. limit: the longest frame that is believed.
    """

    def __init__(self, capacity: int = CAPACITY, limit: int = MAX_FRAME) -> None:
        if capacity < _LENGTH.size + limit:
            raise ValueError(f"a buffer of {capacity} bytes cannot hold a frame of {limit}")
        self._bytes = bytearray(capacity)
        self._view = memoryview(self._bytes)
        self._limit = limit
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes go; empty only while whole frames fill the buffer. Ends what ``peek`` returned."""
        if self._start:
            size = self._end - self._start
            self._view[:size] = self._view[self._start : self._end]
            self._start, self._end = 0, size
        return self._view[self._end :]

    def fed(self, size: int) -> None:
        """So many bytes have been put there."""
        self._end += size

    def peek(self) -> memoryview | None:
        """The next whole frame, in place; None while there is none. Raises FramingError for an impossible length."""
        begin = self._start + _LENGTH.size
        if begin > self._end:
            return None
        (size,) = _LENGTH.unpack_from(self._bytes, self._start)
        if size > self._limit:
            raise FramingError("frame length", expected=f"at most {self._limit}", found=size)
        return self._view[begin : begin + size] if begin + size <= self._end else None

    def skip(self) -> None:
        """Be done with the frame that ``peek`` showed."""
        (size,) = _LENGTH.unpack_from(self._bytes, self._start)
        self._start += _LENGTH.size + size

    def missing(self) -> int:
        """Bytes until the next step: the length's, or the frame's. Who reads no more than that stays in step."""
        have = self._end - self._start
        if have < _LENGTH.size:
            return _LENGTH.size - have
        (size,) = _LENGTH.unpack_from(self._bytes, self._start)
        return max(0, _LENGTH.size + int(size) - have)
