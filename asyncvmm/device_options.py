"""The command line's options for devices, and what they mean: words in, records of device_config out.

--drive PATH[,ro][,overlay][,root][,id=NAME][,cache=MODE]
--net none|user|tap=NAME
--publish [ADDR:]HOST:GUEST
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from asyncvmm.errors import ConfigError

if TYPE_CHECKING:
    from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, Publish, VsockConfig

Command = Callable[..., None]

NAMES = ("drives", "net", "address", "publish", "balloon", "vsock", "rng", "ports")
"""What the options are passed on as."""

_FLAGS = {"ro": "read_only", "root": "root", "overlay": "overlay"}
_VALUES = ("id", "cache", "root_type")


def device_options(command: Command) -> Command:
    """Add the options to a command."""
    options = [
        click.option("--drive", "drives", multiple=True, metavar="PATH[,ro][,overlay][,root]", help="A disk; repeat."),
        click.option("--net", default="none", show_default=True, metavar="none|user|tap=NAME", help="Network card."),
        click.option("--address", metavar="dhcp|none|ADDR/BITS", help="The card's address in the guest."),
        click.option("--publish", multiple=True, metavar="[ADDR:]HOST:GUEST", help="A guest's TCP port on the host."),
        click.option("--balloon", type=int, metavar="MIB", help="A memory balloon of that size at first."),
        click.option("--vsock", metavar="PATH|none", help="A vsock device; PATH is its unix socket."),
        click.option("--rng", is_flag=True, help="An entropy device."),
        click.option("--port", "ports", multiple=True, metavar="NAME", help="A named virtio console port; repeat."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def device_records(
    *,
    drives: Sequence[str],
    net: str,
    address: str | None,
    publish: Sequence[str],
    balloon: int | None,
    vsock: str | None,
    rng: bool,
    ports: Sequence[str],
) -> dict[str, Any]:
    """The VMConfig fields that the options' values mean. Raises ConfigError."""
    return {
        "drives": tuple(parse_drive(text) for text in drives),
        "net": parse_net(net, address, publish),
        "balloon": _balloon(balloon),
        "vsock": _vsock(vsock),
        "rng": rng,
        "virtio_console": _console(ports),
    }


def parse_drive(text: str) -> DriveConfig:
    """``PATH,word,name=value``. A comma in the path is written twice. Raises ConfigError."""
    from asyncvmm.device_config import DriveConfig

    path, *words = text.replace(",,", "\0").split(",")
    fields: dict[str, Any] = {"path": path.replace("\0", ",")}
    for word in words:
        name, _, value = word.partition("=")
        if name in _FLAGS and not value:
            fields[_FLAGS[name]] = True
        elif name in _VALUES and value:
            fields[name] = value
        else:
            expected = ", ".join([*_FLAGS, *(f"{key}=..." for key in _VALUES)])
            raise ConfigError("--drive", expected=f"PATH and any of {expected}", found=repr(word))
    return DriveConfig(**fields)


def parse_net(text: str, address: str | None, publish: Sequence[str]) -> NetConfig | None:
    """``none``, ``user`` or ``tap=NAME``, with what goes with it. Raises ConfigError."""
    from asyncvmm.device_config import NetConfig

    mode, _, tap = text.partition("=")
    if mode == "none" and not tap:
        if publish or address:
            raise ConfigError("--net", expected="user, to publish a port or give an address", found="none")
        return None
    if mode not in ("user", "tap") or bool(tap) != (mode == "tap"):
        raise ConfigError("--net", expected="none, user or tap=NAME", found=repr(text))
    ports = tuple(parse_publish(entry) for entry in publish)
    return NetConfig(mode=mode, tap=tap or None, address=address or "dhcp", publish=ports)  # type: ignore[arg-type]


def parse_publish(text: str) -> Publish:
    """``HOST:GUEST`` or ``ADDR:HOST:GUEST``. Raises ConfigError."""
    from asyncvmm.device_config import Publish

    *address, host, guest = text.split(":") if ":" in text else ("", "")
    if len(address) > 1 or not all(word.isascii() and word.isdigit() and len(word) < 6 for word in (host, guest)):
        raise ConfigError("--publish", expected="[ADDR:]HOST:GUEST", found=repr(text))
    where = {"host_address": address[0]} if address else {}
    return Publish(host_port=int(host), guest_port=int(guest), **where)


def _balloon(mib: int | None) -> BalloonConfig | None:
    from asyncvmm.device_config import BalloonConfig

    return None if mib is None else BalloonConfig(mib=mib)


def _vsock(path: str | None) -> VsockConfig | None:
    from asyncvmm.device_config import VsockConfig

    return None if path is None else VsockConfig(uds_path=None if path == "none" else path)


def _console(ports: Sequence[str]) -> ConsoleConfig | None:
    from asyncvmm.device_config import ConsoleConfig

    return ConsoleConfig(ports=tuple(ports)) if ports else None
