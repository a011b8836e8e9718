"""Ethernet addresses of network cards (IEEE 802: six bytes, the group bit lowest in the first, then the local bit)."""

from __future__ import annotations

import secrets
from typing import Final

from asyncvmm.errors import ConfigError

SIZE: Final = 6
_GROUP: Final = 0x01
_LOCAL: Final = 0x02


def parse_mac(text: str) -> bytes:
    """The bytes of ``aa:bb:cc:dd:ee:ff``. Raises ConfigError for anything but a unicast address."""
    try:
        mac = bytes.fromhex(text.replace(":", "")) if text.count(":") == SIZE - 1 else b""
    except ValueError:
        mac = b""
    if len(mac) != SIZE or mac[0] & _GROUP or not any(mac):
        raise ConfigError("mac", expected="six hex bytes of a unicast address", found=repr(text))
    return mac


def format_mac(mac: bytes) -> str:
    """``aa:bb:cc:dd:ee:ff``."""
    return mac.hex(":")


def draw_mac() -> bytes:
    """A locally administered unicast address that nobody else has, as far as 46 random bits go."""
    mac = bytearray(secrets.token_bytes(SIZE))
    mac[0] = mac[0] & ~_GROUP | _LOCAL
    return bytes(mac)
