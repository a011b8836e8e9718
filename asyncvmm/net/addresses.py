"""The addresses of a user-mode network: the same on every host, whatever that host's own are.

Without a wish of the caller's the guest is 10.0.2.15/24 behind 10.0.2.2, as with QEMU's own user network.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from typing import Final

import attrs

from asyncvmm.device_config import NetConfig
from asyncvmm.errors import ConfigError

DEFAULT_GUEST: Final = IPv4Interface("10.0.2.15/24")
DEFAULT_GATEWAY: Final = IPv4Address("10.0.2.2")
GATEWAY_MAC: Final = "52:55:0a:00:02:02"
"""The helper's own address on the wire."""

MTU: Final = 65520
"""Of the virtual wire, in bytes: the longest IP packet that is a multiple of 4 behind an Ethernet header in 64 KiB.
A frame costs the same work however long it is."""

_LONGEST_PREFIX: Final = 29
"""There must be room for the guest, the gateway, and one or two more."""


@attrs.frozen
class Addresses:
    """guest: the card's address and network. gateway: the way out. dns: what the caller wants for a resolver."""

    guest: IPv4Interface
    gateway: IPv4Address
    dns: IPv4Address | None

    def spare(self, *, last: bool = False) -> IPv4Address:
        """An address of the network that is neither the guest's nor the gateway's."""
        network = self.guest.network
        start, step = (int(network.broadcast_address) - 1, -1) if last else (int(network.network_address) + 1, 1)
        candidates = (IPv4Address(start + step * index) for index in range(3))
        return next(address for address in candidates if address not in (self.guest.ip, self.gateway))


def plan_addresses(config: NetConfig) -> Addresses:
    """What ``config`` says, and defaults for the rest. Raises ConfigError for a network that cannot be."""
    guest = config.address if isinstance(config.address, IPv4Interface) else DEFAULT_GUEST
    network = guest.network
    if network.prefixlen > _LONGEST_PREFIX:
        raise ConfigError("user network", expected=f"a prefix of at most {_LONGEST_PREFIX}", found=guest)
    gateway = config.gateway or _gateway(guest)
    for what, address in (("guest address", guest.ip), ("gateway", gateway)):
        if address not in network or address in (network.network_address, network.broadcast_address):
            raise ConfigError(what, expected=f"a host's address in {network}", found=address)
    if gateway == guest.ip:
        raise ConfigError("gateway", expected="an address that is not the guest's", found=gateway)
    return Addresses(guest, gateway, config.dns)


def _gateway(guest: IPv4Interface) -> IPv4Address:
    if guest != DEFAULT_GUEST and DEFAULT_GATEWAY not in guest.network:
        first = guest.network.network_address + 1
        return first if first != guest.ip else first + 1
    return DEFAULT_GATEWAY if guest.ip != DEFAULT_GATEWAY else DEFAULT_GATEWAY + 1


def first_resolver(resolv_conf: str) -> IPv4Address | None:
    """The first IPv4 name server of a resolv.conf(5)."""
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                return IPv4Address(words[1])
            except ValueError:
                continue
    return None
