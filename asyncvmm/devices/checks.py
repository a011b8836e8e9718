"""Validators for device state records, which come out of snapshot files and are wrong until checked."""

from __future__ import annotations

from collections.abc import Callable

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
