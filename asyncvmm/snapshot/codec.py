"""Plain values as bytes, for the sections of a snapshot: JSON, in which bytes are ``{"$b": base64}``.

Plain values are dicts with str keys, lists, tuples (read back as lists), str, bytes, bool, None, finite floats and ints
from -2^63 to 2^64-1. A key that starts with ``$`` is written with one more.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from typing import Any

import orjson

from asyncvmm.errors import SnapshotDamaged

MOST_BYTES = 64 << 20
"""An encoded value is no longer."""

MOST_DEPTH = 32
"""Dicts and lists are in one another no deeper."""

_BYTES = "$b"


def encode(value: object) -> bytes:
    """A plain value as bytes. Raises ValueError for another, and for one that is too large or too deep."""
    try:
        encoded = orjson.dumps(_escaped(value, MOST_DEPTH))
    except (TypeError, orjson.JSONEncodeError) as error:
        raise ValueError(f"not a plain value: {error}") from None
    if len(encoded) > MOST_BYTES:
        raise ValueError(f"a value of {len(encoded)} bytes, where {MOST_BYTES} is the most")
    return encoded


def decode(data: bytes | memoryview) -> Any:
    """The value that ``encode`` was given. Raises SnapshotDamaged."""
    if len(data) > MOST_BYTES:
        raise SnapshotDamaged("section", expected=f"at most {MOST_BYTES} bytes", found=f"{len(data)} bytes")
    try:
        return _unescaped(orjson.loads(data), MOST_DEPTH)
    except (orjson.JSONDecodeError, Base64Error, ValueError) as error:
        raise SnapshotDamaged("section", expected="plain values", found=str(error)) from None


def _escaped(value: Any, depth: int) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: b64encode(value).decode()}
    if isinstance(value, dict):
        deeper = _deeper(depth)
        return {_escaped_key(key): _escaped(entry, deeper) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        deeper = _deeper(depth)
        return [_escaped(entry, deeper) for entry in value]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"not a plain value: {value!r:.80}")


def _escaped_key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"not a plain value: a dict with the key {key!r:.80}")
    return f"${key}" if key.startswith("$") else key


def _unescaped(value: Any, depth: int) -> Any:
    if isinstance(value, list):
        deeper = _deeper(depth)
        return [_unescaped(entry, deeper) for entry in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return _bytes(value)
    deeper = _deeper(depth)
    return {_unescaped_key(key): _unescaped(entry, deeper) for key, entry in value.items()}


def _bytes(value: dict[str, Any]) -> bytes:
    if len(value) != 1 or not isinstance(value[_BYTES], str):
        raise ValueError(f"{_BYTES} and something else")
    return b64decode(value[_BYTES], validate=True)


def _unescaped_key(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise ValueError(f"the key {key:.80}")
    return key[1:]


def _deeper(depth: int) -> int:
    if not depth:
        raise ValueError(f"more than {MOST_DEPTH} levels")
    return depth - 1
