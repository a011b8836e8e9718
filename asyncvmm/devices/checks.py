"""Validators for device state records, which come out of snapshot files and are wrong until checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from asyncvmm.errors import ConfigError


def within(low: int, high: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    """A validator: an integer from ``low`` to ``high``, both included. It raises ConfigError."""

    def check(_: object, attribute: attrs.Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"saved {attribute.name}", expected=f"{low:#x} to {high:#x}", found=repr(value))

    return check


BYTE = within(0, 0xFF)
"""A validator: an integer from 0 to 255."""


def flag(_: object, attribute: attrs.Attribute[bool], value: bool) -> None:
    """A validator: True or False. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"saved {attribute.name}", expected="True or False", found=repr(value))


def at_most_bytes(limit: int) -> Callable[[object, attrs.Attribute[bytes], bytes], None]:
    """A validator: bytes, ``limit`` of them at the most. It raises ConfigError."""

    def check(_: object, attribute: attrs.Attribute[bytes], value: bytes) -> None:
        if not isinstance(value, bytes):
            raise ConfigError(f"saved {attribute.name}", expected="bytes", found=type(value).__name__)
        if len(value) > limit:
            raise ConfigError(f"saved {attribute.name}", expected=f"at most {limit} bytes", found=f"{len(value)}")

    return check


def exactly_bytes(size: int) -> Callable[[object, attrs.Attribute[bytes], bytes], None]:
    """A validator: bytes, exactly ``size`` of them. It raises ConfigError."""

    def check(_: object, attribute: attrs.Attribute[bytes], value: bytes) -> None:
        if not isinstance(value, bytes) or len(value) != size:
            raise ConfigError(f"saved {attribute.name}", expected=f"{size} bytes", found=repr(value)[:40])

    return check


def mapping(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The record of that name in a saved record. Raises ConfigError."""
    value = _value(state, name)
    if not isinstance(value, Mapping):
        raise ConfigError(f"saved {name}", expected="a record", found=repr(value)[:40])
    return value


def _value(state: Mapping[str, Any], name: str) -> Any:
    """None where there is none. Raises ConfigError for what is no record at all."""
    if not isinstance(state, Mapping):
        raise ConfigError("saved record", expected=f"one with {name}", found=repr(state)[:40])
    return state.get(name)


def integer(state: Mapping[str, Any], name: str, most: int) -> int:
    """The integer of that name in a saved record, from 0 to ``most``. Raises ConfigError."""
    value = _value(state, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(f"saved {name}", expected=f"0 to {most:#x}", found=repr(value)[:40])
    return value


def boolean(state: Mapping[str, Any], name: str) -> bool:
    """The truth value of that name in a saved record. Raises ConfigError."""
    value = _value(state, name)
    if not isinstance(value, bool):
        raise ConfigError(f"saved {name}", expected="True or False", found=repr(value)[:40])
    return value


def hex_bytes(state: Mapping[str, Any], name: str, most: int) -> bytes:
    """The bytes of that name in a saved record, hex digits there, ``most`` bytes at the most. Raises ConfigError."""
    value = _value(state, name)
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or len(data) > most:
        raise ConfigError(f"saved {name}", expected=f"at most {most} bytes in hex", found=repr(value)[:40])
    return data
