from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.x86 import aml


def package_length(encoded: bytes) -> tuple[int, int]:
    """(length it says, bytes it takes), read as an interpreter does."""
    extra = encoded[0] >> 6
    if extra == 0:
        return encoded[0] & 0x3F, 1
    return encoded[0] & 0xF | int.from_bytes(encoded[1 : 1 + extra], "little") << 4, 1 + extra


@given(size=st.integers(0, 5000) | st.sampled_from([56, 57, 58, 59, 4087, 4088, 4089, 1 << 20]))
def test_a_package_length_counts_itself_and_what_follows(size: int) -> None:
    encoded = aml.scope("\\_SB_", bytes(size))[1:]
    said, _ = package_length(encoded)
    assert said == len(encoded)


@given(value=st.integers(0, 2**64 - 1))
def test_an_integer_is_read_back_from_its_shortest_form(value: int) -> None:
    encoded = aml.integer(value)
    sizes = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}
    if value < 2:
        assert encoded == bytes([value])
    else:
        assert len(encoded) == 1 + sizes[encoded[0]]
        assert int.from_bytes(encoded[1:], "little") == value


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_number_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(value)


def test_names_are_encoded_by_their_number_of_segments() -> None:
    assert aml.name_path("COM1") == b"COM1"
    assert aml.name_path("\\_SB_.PWRB") == b"\\\x2e_SB_PWRB"
    assert aml.name_path("\\_SB_.AAAA.BBBB") == b"\\\x2f\x03_SB_AAAABBBB"


@pytest.mark.parametrize("path", ["", "SB", "com1", "1ABC", "_SB_.", "TOOLONG"])
def test_a_name_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="name segment"):
        aml.name_path(path)


def test_an_eisa_id_is_compressed_as_the_standard_shows() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c" + (0x0105D041).to_bytes(4, "little")
