"""Plain values as bytes and back: all of them come back, and nothing else does."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.codec import MOST_BYTES, MOST_DEPTH, decode, encode

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
KEYS = TEXT | st.sampled_from(["$b", "$", "$$b", "$$", "$x"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.binary(max_size=40)
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=30)


@given(VALUES)
def test_every_plain_value_comes_back(value: Any) -> None:
    assert decode(encode(value)) == value


@given(VALUES)
def test_kinds_come_back_too(value: Any) -> None:
    assert repr(decode(encode(value))) == repr(value)


def test_tuples_come_back_as_lists() -> None:
    assert decode(encode({"runs": ((1, 2), (3, 4))})) == {"runs": [[1, 2], [3, 4]]}


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_whatever_holds_bytes_is_bytes(kind: type) -> None:
    assert decode(encode([kind(b"abc")])) == [b"abc"]


def test_a_view_of_bytes_is_decoded() -> None:
    assert decode(memoryview(encode({"a": b"b"}))) == {"a": b"b"}


@pytest.mark.parametrize(
    "value",
    [1 << 64, -(1 << 63) - 1, float("nan"), float("inf"), {1: 2}, {None: 1}, {1, 2}, object(), "\ud800", [{"a": 1j}]],
    ids=repr,
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a plain value"):
        encode(value)


def test_what_is_too_deep_is_refused() -> None:
    value: Any = []
    for _ in range(MOST_DEPTH):
        value = [value]
    with pytest.raises(ValueError, match="levels"):
        encode(value)
    with pytest.raises(SnapshotDamaged):
        decode(orjson.dumps(value))
    assert decode(encode(value[0])) == value[0]


def test_what_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="levels"):
        encode(value)


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
def test_the_deepest_of_json_ends_in_a_typed_error(depth: int) -> None:
    with pytest.raises(SnapshotDamaged):
        decode(b"[" * depth + b"]" * depth)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="the most"):
        encode(bytes(MOST_BYTES))
    with pytest.raises(SnapshotDamaged) as caught:
        decode(bytes(MOST_BYTES + 1))
    assert str(MOST_BYTES) in str(caught.value.expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nan",
        b'{"$b": 1}',
        b'{"$b": "a"}',
        b'{"$b": "YQ=="; "x": 1}',
        b'{"$b": "YQ==", "x": 1}',
        b'{"$b": "Y!Q="}',
        b'{"$x": 1}',
        b'{"$": 1}',
        b'{"$b": "\xc3\xa9"}',
        b"\xff",
    ],
)
def test_anything_else_is_damage(data: bytes) -> None:
    with pytest.raises(SnapshotDamaged):
        decode(data)


@given(st.binary(max_size=60) | VALUES.map(encode), st.data())
def test_any_bytes_are_a_value_or_damage(data: bytes, draw: st.DataObject) -> None:
    flipped = bytearray(data)
    if flipped:
        flipped[draw.draw(st.integers(0, len(flipped) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        decode(bytes(flipped))
    except SnapshotDamaged:
        return
