"""How passt is started: its command line.

Facts: passt(1). Every address it would copy from the host is given, and with them ``--interface lo``: so the network is
the same on every host, and passt starts on one that has nothing but a loopback. The guest does not reach the host's own
loopback (``--no-map-gw``); it reaches what the host serves on its other addresses.

passt makes itself a user ``nobody`` if it is root, and enters namespaces of its own: where the kernel refuses a user
namespace, or the root file system is the initial ramdisk (pivot_root), it does not start.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

from asyncvmm.device_config import Publish
from asyncvmm.errors import ConfigError
from asyncvmm.net.addresses import GATEWAY_MAC, MTU, Addresses


def passt_command(
    path: str, fd: int, addresses: Addresses, publish: Sequence[Publish], dns_options: Sequence[str]
) -> list[str]:
    """passt in the foreground, its end of the wire the descriptor ``fd``. Raises ConfigError."""
    return [
        *(path, "--foreground", "--quiet", "--fd", str(fd), "--ipv4-only"),
        *("--interface", "lo", "--mac-addr", GATEWAY_MAC, "--mtu", str(MTU)),
        *("--address", str(addresses.guest.ip), "--netmask", str(addresses.guest.netmask)),
        *("--gateway", str(addresses.gateway), "--no-map-gw"),
        *dns_options,
        *_published(publish),
    ]


def _published(publish: Sequence[Publish]) -> list[str]:
    targets: dict[int, int] = {}
    options = []
    for entry in publish:
        if targets.setdefault(entry.host_port, entry.guest_port) != entry.guest_port:
            raise ConfigError(
                f"published host port {entry.host_port}",
                expected="one guest port, whatever the host address",
                found=f"{targets[entry.host_port]} and {entry.guest_port}",
            )
        options += ["--tcp-ports", f"{entry.host_address}/{entry.host_port}:{entry.guest_port}"]
    return options


def plan_dns(
    addresses: Addresses, resolver: IPv4Address | None, help_text: str
) -> tuple[IPv4Address | None, list[str]]:
    """The guest's resolver, None if there is none, and the options for it.

    resolver: the host's. One on the host's loopback is out of the guest's reach, so that an address of the guest's
    network stands for it; ``help_text``, what ``passt --help`` prints, says in which words (only then is it looked at).
    A passt without ``--dns-host`` (before 2024) takes the resolver from the host's resolv.conf, and does not offer the
    stand-in by DHCP.
    """
    if addresses.dns is not None:
        return addresses.dns, ["--dns", str(addresses.dns)]
    if resolver is None:
        return None, ["--dns", "none"]
    if not resolver.is_loopback:
        return resolver, ["--dns", str(resolver)]
    stand_in = addresses.spare()
    options = ["--dns-forward", str(stand_in)]
    if "--dns-host" in help_text:
        options += ["--dns", str(stand_in), "--dns-host", str(resolver)]
    return stand_in, options
