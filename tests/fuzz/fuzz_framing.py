"""The frames of a network helper's stream, cut anywhere."""

from __future__ import annotations

from asyncvmm.net.framing import FrameBuffer, FramingError, prefix
from tests.fuzz.script import Script

LIMIT = 64
CAPACITY = 100


def run(data: bytes) -> None:
    """One stream: what comes out are the frames that went in, and nothing is read over the end of one."""
    script, frames = Script(data), FrameBuffer(CAPACITY, LIMIT)
    stream, expected = _stream(script)
    found = []
    while stream:
        space = frames.space()
        size = min(len(space), len(stream), 1 + script.byte() if script.flag() else frames.missing() or 1)
        assert 0 <= frames.missing() <= 4 + LIMIT
        space[:size] = stream[:size]
        frames.fed(size)
        del stream[:size]
        try:
            while (frame := frames.peek()) is not None:
                assert frames.missing() == 0
                found.append(bytes(frame))
                frames.skip()
        except FramingError:
            assert expected[len(found)] is None, "a frame that is as it must be was refused"
            return
        assert size, "no room, and no frame"
    assert found == expected[: len(found)]
    assert len(expected) - len(found) <= 1


def _stream(script: Script) -> tuple[bytearray, list[bytes | None]]:
    """Frames, and what is to come of each; None for one that is too long."""
    stream, expected = bytearray(), list[bytes | None]()
    while not script.ended and len(expected) < 20:
        size = script.byte() % (LIMIT + 4) if script.byte() % 16 else script.number(4)
        whole = size <= LIMIT
        frame = script.data(size) if whole else b""
        stream += prefix(size) + frame
        expected.append(frame if whole else None)
    return stream, expected
