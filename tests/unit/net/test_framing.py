"""Frames in a byte stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.net.framing import MAX_FRAME, FrameBuffer, FramingError, prefix

FRAMES = st.lists(st.binary(max_size=40), max_size=20)
CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def feed(buffer: FrameBuffer, data: bytes) -> None:
    space = buffer.space()
    space[: len(data)] = data
    buffer.fed(len(data))


def take_all(buffer: FrameBuffer) -> list[bytes]:
    found = []
    while (frame := buffer.peek()) is not None:
        found.append(bytes(frame))
        buffer.skip()
    return found


@given(frames=FRAMES, cuts=CUTS)
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(prefix(len(frame)) + frame for frame in frames)
    buffer, found, at = FrameBuffer(capacity=64, limit=40), [], 0
    while at < len(stream):
        size = min(cuts[at % len(cuts)], len(buffer.space()))
        feed(buffer, stream[at : at + size])
        at += size
        found += take_all(buffer)
    assert found == frames


@given(frames=FRAMES)
def test_who_reads_no_more_than_what_is_missing_stays_in_step(frames: list[bytes]) -> None:
    stream = b"".join(prefix(len(frame)) + frame for frame in frames)
    buffer, at = FrameBuffer(capacity=64, limit=40), 0
    for frame in frames:
        while buffer.peek() is None:
            size = buffer.missing()
            feed(buffer, stream[at : at + size])
            at += size
        assert buffer.missing() == 0
        assert take_all(buffer) == [frame]
        assert buffer.space().nbytes == 64


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_impossible_length_is_refused(length: int) -> None:
    buffer = FrameBuffer()
    feed(buffer, prefix(length))
    with pytest.raises(FramingError, match=f"found {length}"):
        buffer.peek()


@given(data=st.binary(max_size=300))
def test_any_bytes_are_frames_or_an_error(data: bytes) -> None:
    buffer = FrameBuffer(capacity=64, limit=40)
    try:
        for at in range(0, len(data), 8):
            feed(buffer, data[at : at + 8])
            assert all(len(frame) <= 40 for frame in take_all(buffer))
    except FramingError:
        return


def test_a_buffer_holds_the_longest_frame_or_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        FrameBuffer(capacity=43, limit=40)
    buffer = FrameBuffer(capacity=44, limit=40)
    feed(buffer, prefix(40) + bytes(40))
    assert bytes(buffer.peek() or b"") == bytes(40)
    assert not buffer.space()
