"""How gvproxy is started: its configuration file, which is JSON because YAML takes that too.

Facts: gvisor-tap-vsock, cmd/gvproxy/config.go and pkg/types/configuration.go. ``-config`` came with its version 0.8.8.
The host's loopback, which it would show as the network's last address, leads nowhere here. What cannot be turned off is
its service on port 80 of the gateway: by that a guest can publish ports on the host by itself. passt has no such thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from asyncvmm.device_config import Publish
from asyncvmm.net.addresses import GATEWAY_MAC, MTU, Addresses

LEAST_VERSION = "0.8.8"

_NOWHERE = "240.0.0.1"


def gvproxy_command(path: str, config_fd: int) -> list[str]:
    """gvproxy with the configuration that the descriptor ``config_fd`` leads to."""
    return [path, "-config", f"/dev/fd/{config_fd}"]


def gvproxy_config(socket_path: str, mac: str, addresses: Addresses, publish: Sequence[Publish]) -> bytes:
    """One guest of that card's address, which finds gvproxy on the unix socket ``socket_path``."""
    guest, host = str(addresses.guest.ip), str(addresses.spare(last=True))
    forwards = {f"{entry.host_address}:{entry.host_port}": f"{guest}:{entry.guest_port}" for entry in publish}
    stack = {
        "mtu": MTU,
        "subnet": str(addresses.guest.network),
        "gatewayIP": str(addresses.gateway),
        "gatewayMacAddress": GATEWAY_MAC,
        "deviceIP": guest,
        "hostIP": host,
        "nat": {host: _NOWHERE},
        "gatewayVirtualIPs": [str(addresses.gateway)],
        "dhcpStaticLeases": {guest: mac},
        "forwards": forwards,
    }
    return orjson.dumps({"log-level": "warning", "interfaces": {"qemu": f"unix://{socket_path}"}, "stack": stack})
