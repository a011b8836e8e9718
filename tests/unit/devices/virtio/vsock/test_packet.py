"""The packet header, against the layout of virtio 1.2, section 5.10.6."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.vsock.packet import HEADER_SIZE, HOST_CID, OP_RW, TYPE_STREAM, Header


def test_the_fields_lie_where_the_specification_puts_them() -> None:
    data = Header(0x0102030405060708, HOST_CID, 0x11, 0x22, 0x33, TYPE_STREAM, OP_RW, 0x44, 0x55, 0x66).encode()
    assert len(data) == HEADER_SIZE == 44
    assert data[:8] == bytes.fromhex("0807060504030201")
    assert struct.unpack_from("<QIIIHHIII", data, 8) == (2, 0x11, 0x22, 0x33, 1, 5, 0x44, 0x55, 0x66)


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE + 8))
def test_any_bytes_are_a_header_and_come_back_as_they_were(data: bytes) -> None:
    assert Header.decode(data).encode() == data[:HEADER_SIZE]


def test_fewer_bytes_are_none() -> None:
    with pytest.raises(struct.error):
        Header.decode(bytes(HEADER_SIZE - 1))
