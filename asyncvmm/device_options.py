"""The command line's options for devices, and what they mean: words in, records of device_config out.

--drive PATH[,ro][,overlay][,root][,root_type=TYPE][,id=NAME][,cache=MODE]
--net none|user|tap=NAME, --address dhcp|none|ADDR/BITS, --publish [ADDR:]HOST:GUEST
--balloon MIB, --vsock PATH|none, --rng, --port NAME
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from asyncvmm.errors import ConfigError

if TYPE_CHECKING:
    from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, Publish, VsockConfig

Command = Callable[..., None]

DEFAULTS: dict[str, Any] = {
    "drives": (),
    "net": "none",
    "address": None,
    "publish": (),
    "balloon": None,
    "vsock": None,
    "rng": False,
    "ports": (),
}
"""What the options are passed on as, where none is given."""

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

    if "\0" in text:
        raise ConfigError("--drive", expected="text without NUL", found=repr(text))
    path, *words = (word.replace("\0", ",") for word in text.replace(",,", "\0").split(","))
    fields: dict[str, Any] = {"path": path}
    for word in words:
        name, value = _drive_word(word)
        if name in fields:
            raise ConfigError("--drive", expected="each word once", found=repr(word))
        fields[name] = value
    return DriveConfig(**fields)


def _drive_word(word: str) -> tuple[str, str | bool]:
    """The record's field that a word means, and its value."""
    if word in _FLAGS:
        return _FLAGS[word], True
    name, _, value = word.partition("=")
    if name in _VALUES and value:
        return name, value
    expected = ", ".join([*_FLAGS, *(f"{key}=..." for key in _VALUES)])
    raise ConfigError("--drive", expected=f"PATH and any of {expected}", found=repr(word))


def parse_net(text: str, address: str | None, publish: Sequence[str]) -> NetConfig | None:
    """``none``, ``user`` or ``tap=NAME``, with what goes with it. Raises ConfigError."""
    from asyncvmm.device_config import NetConfig

    mode, _, tap = text.partition("=")
    if mode == "none" and not tap:
        if publish or address is not None:
            raise ConfigError("--net", expected="user, to publish a port or give an address", found="none")
        return None
    if mode not in ("user", "tap") or bool(tap) != (mode == "tap"):
        raise ConfigError("--net", expected="none, user or tap=NAME", found=repr(text))
    ports = tuple(parse_publish(entry) for entry in publish)
    address = "dhcp" if address is None else address
    return NetConfig(mode=mode, tap=tap or None, address=address, publish=ports)  # type: ignore[arg-type]


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
