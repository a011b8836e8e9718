"""The first words on a wire: asking the gateway for its address by ARP (RFC 826), which shows that the helper works."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Final

from asyncvmm.net.framing import prefix

_ETHERTYPE_ARP: Final = 0x0806
_ETHERTYPE_IPV4: Final = 0x0800
_REQUEST, _REPLY = 1, 2
_FIXED = struct.Struct(">6s6sHHHBBH6s4s6s4s")


def arp_request(mac: bytes, sender: IPv4Address, target: IPv4Address) -> bytes:
    """ "Who has ``target``? Tell ``sender``", as it goes through a stream socket."""
    frame = _FIXED.pack(
        *(b"\xff" * 6, mac, _ETHERTYPE_ARP, 1, _ETHERTYPE_IPV4, 6, 4, _REQUEST),
        *(mac, sender.packed, bytes(6), target.packed),
    )
    return prefix(len(frame)) + frame


def is_arp_reply(frame: bytes | memoryview, target: IPv4Address) -> bool:
    """Whether it says where ``target`` is."""
    if len(frame) < _FIXED.size:
        return False
    _, _, ethertype, _, _, _, _, operation, _, sender, _, _ = _FIXED.unpack_from(frame)
    return (ethertype, operation, sender) == (_ETHERTYPE_ARP, _REPLY, target.packed)
