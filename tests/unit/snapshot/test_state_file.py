"""Sections in one file: each with its own checksum, none longer than what is there."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.state_file import MAGIC, MOST_SECTION_BYTES, MOST_SECTIONS, pack, unpack

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)
SECTIONS = st.dictionaries(NAMES, st.binary(max_size=100), max_size=8)


@given(SECTIONS)
def test_sections_come_back_in_their_order(sections: dict[str, bytes]) -> None:
    assert list(unpack(pack(sections)).items()) == list(sections.items())


@given(SECTIONS, st.data())
def test_one_flipped_bit_is_found(sections: dict[str, bytes], draw: st.DataObject) -> None:
    data = bytearray(pack(sections))
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        found = unpack(bytes(data))
    except SnapshotDamaged:
        return
    # The manifest's SHA-256 finds the rest: a name is not in its section's checksum.
    assert found.keys() != sections.keys()
    assert list(found.values()) == list(sections.values())


@given(SECTIONS, st.data())
def test_a_truncated_file_is_refused(sections: dict[str, bytes], draw: st.DataObject) -> None:
    data = pack(sections)
    with pytest.raises(SnapshotDamaged):
        unpack(data[: draw.draw(st.integers(0, len(data) - 1))])


def test_a_longer_file_is_refused() -> None:
    with pytest.raises(SnapshotDamaged, match="1 bytes more"):
        unpack(pack({"a": b"1"}) + b"\0")


def test_damage_names_its_section() -> None:
    data = pack({"vm": b"one", "vcpu0": b"two"}).replace(b"two", b"twp")
    with pytest.raises(SnapshotDamaged, match="section vcpu0"):
        unpack(data)


def test_a_section_that_comes_twice_is_refused() -> None:
    data = bytearray(pack({"a": b"1", "b": b"1"}))
    data[data.index(b"\x01b") + 1] = ord("a")
    with pytest.raises(SnapshotDamaged, match="a twice"):
        unpack(bytes(data))


def test_sizes_that_lie_are_not_believed() -> None:
    head = MAGIC + struct.pack("<I", 1) + b"\x01a"
    with pytest.raises(SnapshotDamaged, match="bytes left"):
        unpack(head + struct.pack("<QI", 1000, 0))
    with pytest.raises(SnapshotDamaged, match="at most"):
        unpack(head + struct.pack("<QI", MOST_SECTION_BYTES + 1, 0))
    with pytest.raises(SnapshotDamaged, match=f"at most {MOST_SECTIONS}"):
        unpack(MAGIC + struct.pack("<I", 0xFFFFFFFF))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "é", "x" * 101])
def test_names_that_would_not_be_read_back_are_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="no section"):
        pack({name: b""})


def test_more_sections_than_are_read_are_not_written() -> None:
    with pytest.raises(ValueError, match="256 sections"):
        pack({f"s{number}": b"" for number in range(MOST_SECTIONS + 1)})
