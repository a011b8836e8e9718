from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.machine.kvm.state.fields import Fields
from asyncvmm.snapshot.codec import encode

RECORD = {
    "number": 5,
    "flag": True,
    "content": b"12345678",
    "nothing": None,
    "list": [1, 2],
    "inner": {"number": 1},
    "text": "x",
}
FIELDS = Fields.of("section", encode(RECORD))


def test_what_is_right_is_given() -> None:
    assert FIELDS.integer("number", 5, 5) == 5
    assert FIELDS.integer_or_none("nothing") is None
    assert FIELDS.integer_or_none("number") == 5
    assert FIELDS.content("content", 0, 8, 4) == b"12345678"
    assert FIELDS.exactly("content", 8) == b"12345678"
    assert FIELDS.exactly_or_none("nothing", 8) is None
    assert FIELDS.integers("list", 2, 2) == [1, 2]
    assert FIELDS.fields("inner").integer("number") == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda: FIELDS.value("missing"),
        lambda: FIELDS.integer("number", 4),
        lambda: FIELDS.integer("number", 9, 6),
        lambda: FIELDS.integer("flag"),
        lambda: FIELDS.integer("nothing"),
        lambda: FIELDS.integer_or_none("text"),
        lambda: FIELDS.content("content", 9, 20),
        lambda: FIELDS.content("content", 0, 7),
        lambda: FIELDS.content("content", 0, 8, 3),
        lambda: FIELDS.content("text", 0, 8),
        lambda: FIELDS.exactly("content", 7),
        lambda: FIELDS.exactly_or_none("content", 7),
        lambda: FIELDS.entries("list", 1),
        lambda: FIELDS.entries("inner", 1),
        lambda: FIELDS.integers("list", 2, 1),
        lambda: FIELDS.fields("list"),
    ],
)
def test_what_is_wrong_is_damage_and_named(read: Callable[[], object]) -> None:
    with pytest.raises(SnapshotDamaged, match="section") as caught:
        read()
    assert caught.value.expected is not None
    assert caught.value.found is not None


@pytest.mark.parametrize("value", [None, 5, "text", [], b"bytes"])
def test_what_is_no_record_is_damage(value: object) -> None:
    with pytest.raises(SnapshotDamaged, match="section"):
        Fields.of("section", encode(value))


@given(st.binary(max_size=50))
def test_bytes_that_are_no_section_are_damage(data: bytes) -> None:
    with pytest.raises(SnapshotDamaged):
        Fields.of("section", data)
