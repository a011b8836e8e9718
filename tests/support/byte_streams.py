"""Reading so much, or until an end, from a stream of bytes."""

from __future__ import annotations

from anyio.abc import ByteReceiveStream


async def read_exactly(stream: ByteReceiveStream, size: int) -> bytes:
    """``size`` bytes, and none that follow."""
    data = bytearray()
    while len(data) < size:
        data += await stream.receive(size - len(data))
    return bytes(data)


async def read_until(stream: ByteReceiveStream, end: bytes) -> bytes:
    """All up to ``end``, and nothing that follows."""
    data = b""
    while not data.endswith(end):
        data += await stream.receive(1)
    return data
