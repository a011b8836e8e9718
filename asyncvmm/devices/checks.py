"""Validators for device state records, which come out of snapshot files and are wrong until checked."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from asyncvmm.errors import ConfigError

MOST_SHOWN = 80
"""Characters of a wrong value that its error shows."""


def shown(value: object) -> str:
    """A wrong value for its error: the beginning of it, however large it is."""
    try:
        return reprlib.repr(value)[:MOST_SHOWN]
    except ValueError:  # Python does not print integers of thousands of digits
        return f"{type(value).__name__} with an integer of thousands of digits"


def within(low: int, high: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    """A validator: an integer from ``low`` to ``high``, both included. It raises ConfigError."""

    def check(_: object, attribute: attrs.Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"saved {attribute.name}", expected=f"{low:#x} to {high:#x}", found=shown(value))

    return check


BYTE = within(0, 0xFF)
"""A validator: an integer from 0 to 255."""


def flag(_: object, attribute: attrs.Attribute[bool], value: bool) -> None:
    """A validator: True or False. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"saved {attribute.name}", expected="True or False", found=shown(value))


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
            raise ConfigError(f"saved {attribute.name}", expected=f"{size} bytes", found=shown(value))

    return check


def mapping(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The record of that name in a saved record. Raises ConfigError."""
    value = entry(state, name)
    if not isinstance(value, Mapping):
        raise ConfigError(f"saved {name}", expected="a record", found=shown(value))
    return value


def entry(state: Mapping[str, Any], name: str) -> Any:
    """What has that name in a saved record, unchecked; None where there is none. Raises ConfigError for no record."""
    if not isinstance(state, Mapping):
        raise ConfigError("saved record", expected=f"one with {name}", found=shown(state))
    return state.get(name)


def integer(state: Mapping[str, Any], name: str, most: int) -> int:
    """The integer of that name in a saved record, from 0 to ``most``. Raises ConfigError."""
    value = entry(state, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(f"saved {name}", expected=f"0 to {most:#x}", found=shown(value))
    return value


def boolean(state: Mapping[str, Any], name: str) -> bool:
    """The truth value of that name in a saved record. Raises ConfigError."""
    value = entry(state, name)
    if not isinstance(value, bool):
        raise ConfigError(f"saved {name}", expected="True or False", found=shown(value))
    return value


def hex_bytes(state: Mapping[str, Any], name: str, most: int) -> bytes:
    """The bytes of that name in a saved record, hex digits there, ``most`` bytes at the most. Raises ConfigError."""
    value = entry(state, name)
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or len(data) > most:
        raise ConfigError(f"saved {name}", expected=f"at most {most} bytes in hex", found=shown(value))
    return data
