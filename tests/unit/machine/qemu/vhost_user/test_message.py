"""vhost-user messages: put together from any pieces, and refused for what they must not be."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.qemu.vhost_user import message as m
from asyncvmm.machine.qemu.vhost_user.message import Decoder, Message, VhostUserError


def wire(request: int, payload: bytes = b"", flags: int = m.VERSION) -> bytes:
    return struct.pack("<III", request, flags, len(payload)) + payload


def decode(data: bytes, pieces: list[int]) -> list[Message]:
    """Feed ``data`` in pieces of at most these sizes, over and over."""
    decoder, found, turn = Decoder(), [], 0
    while data:
        size = min(decoder.wanted, pieces[turn % len(pieces)])
        message = decoder.feed(data[:size])
        data, turn = data[size:], turn + 1
        if message is not None:
            found.append(message)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=100)), max_size=5),
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_messages_come_whole_from_any_pieces(messages: list[tuple[int, bytes]], pieces: list[int]) -> None:
    data = b"".join(wire(*message) for message in messages)
    assert [(found.request, found.payload) for found in decode(data, pieces)] == messages


@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_refused(data: bytes) -> None:
    try:
        decode(data, [64])
    except VhostUserError:
        return


def test_descriptors_stay_with_their_message() -> None:
    decoder = Decoder()
    assert decoder.feed(wire(5, b"abcd")[:12], (7, 8)) is None
    message = decoder.feed(b"abcd")
    assert message == Message(5, 1, b"abcd", (7, 8))
    assert decoder.feed(wire(1)) == Message(1, 1)


@pytest.mark.parametrize("flags", [0, 2, 3, m.VERSION | m.FLAG_REPLY])
def test_another_version_and_a_reply_are_refused(flags: int) -> None:
    with pytest.raises(VhostUserError, match="flags"):
        Decoder().feed(wire(1, flags=flags))


def test_a_long_payload_and_many_descriptors_are_refused() -> None:
    with pytest.raises(VhostUserError, match="payload"):
        Decoder().feed(struct.pack("<III", 1, 1, m.MAX_PAYLOAD + 1))
    decoder = Decoder()
    with pytest.raises(VhostUserError, match="descriptors"):
        decoder.feed(b"x", tuple(range(9)))
    assert len(decoder.take_descriptors()) == 9


@given(st.binary(max_size=400))
def test_any_payload_is_read_or_refused(payload: bytes) -> None:
    for read in (m.decode_u64, m.decode_state, m.decode_addresses, m.decode_regions, m.decode_config):
        try:
            read(payload)
        except VhostUserError:
            continue


def test_a_memory_table_is_read() -> None:
    payload = struct.pack("<II QQQQ QQQQ", 2, 0, 0, 0x1000, 0x7F0000000000, 0, 0x100000, 0x2000, 0x7F1000000000, 0x1000)
    assert m.decode_regions(payload) == [
        m.Region(0, 0x1000, 0x7F0000000000, 0),
        m.Region(0x100000, 0x2000, 0x7F1000000000, 0x1000),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<II", 0, 0),
        struct.pack("<II", 9, 0) + bytes(32 * 9),
        struct.pack("<II", 1, 0) + bytes(31),
        struct.pack("<IIQQQQ", 1, 0, 0, 0, 0, 0),
        struct.pack("<IIQQQQ", 1, 0, 2**64 - 1, 1, 0, 0),
        struct.pack("<IIQQQQ", 1, 0, 0, 2**63, 0, 2**63),
    ],
)
def test_an_impossible_memory_table_is_refused(payload: bytes) -> None:
    with pytest.raises(VhostUserError):
        m.decode_regions(payload)
