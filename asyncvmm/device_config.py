"""What a caller asks for beside processor and memory: DriveConfig, NetConfig, BalloonConfig, VsockConfig and so on.

Everything that can be checked without the host is checked here, at once. The same records serve both machines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import attrs

from asyncvmm.device_list import DeviceConfig as DeviceConfig
from asyncvmm.errors import ConfigError

CacheMode = Literal["writeback", "none", "unsafe"]
RootType = Literal["auto", "ext4", "squashfs", "erofs"]
NetMode = Literal["none", "user", "tap"]
Ipv4 = Literal["dhcp", "none"] | IPv4Interface

MAX_DRIVES = 8
MAX_PORTS = 15
"""Named ports of the virtio console beside port 0."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,19}")
_INTERFACE = re.compile(r"[^\s/]{1,15}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_MOST_PORT = 65535
_LEAST_CID, _MOST_CID = 3, 2**32 - 2

R = TypeVar("R")
Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _of(what: str, *kinds: type) -> Check:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{what} {attribute.name}", expected=kinds[0].__name__, found=repr(value))

    return check


def _path(value: str | Path) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ConfigError("path", expected="a path", found=repr(value))
    return Path(value)


def _optional_path(value: str | Path | None) -> Path | None:
    return None if value is None else _path(value)


def _overlay(value: bool | str | Path) -> bool | Path:
    return value if isinstance(value, bool) else _path(value)


def _lower(value: str | None) -> str | None:
    return value.lower() if isinstance(value, str) else value


def _check_id(what: str) -> Check:
    def check(_: object, __: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise ConfigError(what, expected="1 to 20 letters, digits, dots, dashes", found=repr(value))

    return check


def _one_of(what: str, choices: tuple[str, ...]) -> Check:
    def check(_: object, __: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ConfigError(what, expected=" or ".join(choices), found=repr(value))

    return check


def _within(what: str, least: int, most: int) -> Check:
    def check(_: object, __: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(what, expected=f"{least} to {most}", found=repr(value))

    return check


@attrs.frozen(kw_only=True)
class DriveConfig:
    """One disk: a raw image file or a block device.

    path: the image. id: its name in metrics, and what the guest reads as its serial number; None takes ``drive0``,
    ``drive1`` and so on. read_only: the guest cannot write it. root: it holds the guest's root filesystem, of type
    ``root_type``. overlay: the guest's writes go to a sparse copy that dies with the VM, and ``path`` stays as it is;
    a path keeps the copy there. cache: ``writeback`` (the host's page cache; a flush is an fdatasync), ``none``
    (O_DIRECT), ``unsafe`` (page cache, and flushes are not carried out). discard: whether the guest's discards punch
    holes in the file.

    Raises ConfigError.
    """

    path: Path = attrs.field(converter=_path)
    id: str | None = attrs.field(default=None, validator=attrs.validators.optional(_check_id("drive id")))
    read_only: bool = attrs.field(default=False, validator=_of("drive", bool))
    root: bool = attrs.field(default=False, validator=_of("drive", bool))
    root_type: RootType = attrs.field(default="auto", validator=_one_of("root_type", get_args(RootType)))
    overlay: bool | Path = attrs.field(default=False, converter=_overlay)
    cache: CacheMode = attrs.field(default="writeback", validator=_one_of("cache", get_args(CacheMode)))
    discard: bool = attrs.field(default=True, validator=_of("drive", bool))

    def __attrs_post_init__(self) -> None:
        if self.read_only and self.overlay is not False:
            raise ConfigError("drive overlay", expected="a drive that can be written", found="read_only")


@attrs.frozen(kw_only=True)
class Publish:
    """One guest TCP port made reachable on the host: ``host_address:host_port`` leads to ``guest_port``."""

    host_port: int = attrs.field(validator=_within("published host port", 1, _MOST_PORT))
    guest_port: int = attrs.field(validator=_within("published guest port", 1, _MOST_PORT))
    host_address: str = attrs.field(default="127.0.0.1")

    @host_address.validator
    def _check_address(self, _: object, value: object) -> None:
        try:
            IPv4Address(str(value))
        except ValueError:
            raise ConfigError("published address", expected="an IPv4 address", found=repr(value)) from None


def _publishes(value: Iterable[Publish | tuple[int, int]]) -> tuple[Publish, ...]:
    """Publish records, or (host_port, guest_port) pairs."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError("published ports", expected="a sequence", found=repr(value))
    return tuple(_publish(entry) for entry in value)


def _publish(entry: object) -> Publish:
    if isinstance(entry, Publish):
        return entry
    if isinstance(entry, tuple) and len(entry) == 2:
        return Publish(host_port=entry[0], guest_port=entry[1])
    raise ConfigError("published port", expected="Publish or (host_port, guest_port)", found=repr(entry))


def _ipv4(value: str | IPv4Interface) -> Ipv4:
    if isinstance(value, IPv4Interface):
        return value
    if value in ("dhcp", "none"):
        return "dhcp" if value == "dhcp" else "none"
    try:
        if not isinstance(value, str) or "/" not in value:
            raise ValueError
        return IPv4Interface(value)
    except ValueError:
        raise ConfigError("guest address", expected="dhcp, none or ADDRESS/PREFIX", found=repr(value)) from None


def _address(value: str | IPv4Address | None) -> IPv4Address | None:
    try:
        return None if value is None else IPv4Address(value)
    except ValueError:
        raise ConfigError("network", expected="an IPv4 address", found=repr(value)) from None


@attrs.frozen(kw_only=True)
class NetConfig:
    """One network card.

    mode: ``user`` (a helper process without privileges, passt or gvproxy, whichever is found) or ``tap`` (an existing
    or new TAP interface ``tap``, which wants CAP_NET_ADMIN). mac: ``aa:bb:cc:dd:ee:ff``, None draws one. address:
    what PID 1 gives the card: ``dhcp``, ``none``, or ``ADDRESS/PREFIX`` with ``gateway`` and ``dns``; ``user`` mode
    serves DHCP. publish: guest ports reachable on the host, in ``user`` mode.

    Raises ConfigError.
    """

    mode: NetMode = attrs.field(default="user", validator=_one_of("network mode", ("user", "tap")))
    tap: str | None = attrs.field(default=None)
    mac: str | None = attrs.field(default=None, converter=_lower)
    address: Ipv4 = attrs.field(default="dhcp", converter=_ipv4)
    gateway: IPv4Address | None = attrs.field(default=None, converter=_address)
    dns: IPv4Address | None = attrs.field(default=None, converter=_address)
    publish: tuple[Publish, ...] = attrs.field(default=(), converter=_publishes)

    @tap.validator
    def _check_tap(self, _: object, value: object) -> None:
        if self.mode == "tap" and (not isinstance(value, str) or not _INTERFACE.fullmatch(value)):
            raise ConfigError("tap", expected="an interface's name of at most 15 characters", found=repr(value))
        if self.mode == "user" and value is not None:
            raise ConfigError("tap", expected='none with mode="user"', found=repr(value))

    @mac.validator
    def _check_mac(self, _: object, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, str) or not _MAC.fullmatch(value) or int(value[:2], 16) & 1:
            raise ConfigError("mac", expected="six hex bytes of a unicast address", found=repr(value))

    def __attrs_post_init__(self) -> None:
        if self.mode == "tap" and self.publish:
            raise ConfigError("published ports", expected='mode="user"', found="tap")
        ports = [(entry.host_address, entry.host_port) for entry in self.publish]
        if len(set(ports)) != len(ports):
            raise ConfigError("published ports", expected="each host port once", found=ports)


@attrs.frozen(kw_only=True)
class BalloonConfig:
    """A memory balloon: pages the guest gives back to the host.

    mib: its size at first, in MiB. deflate_on_oom: the guest may take pages back by itself when it runs out.
    stats_interval_s: whole seconds between two looks at the guest's statistics; 0 asks only when ``stats()`` does.
    free_page_reporting: the guest hands free pages over as they become free. free_page_hinting: the guest can be
    asked which pages are free.

    Raises ConfigError.
    """

    mib: int = attrs.field(default=0, validator=_within("balloon size in MiB", 0, 16 * 1024 * 1024))
    deflate_on_oom: bool = attrs.field(default=True, validator=_of("balloon", bool))
    stats_interval_s: int = attrs.field(default=0, validator=_within("balloon statistics interval", 0, 86400))
    free_page_reporting: bool = attrs.field(default=True, validator=_of("balloon", bool))
    free_page_hinting: bool = attrs.field(default=False, validator=_of("balloon", bool))


@attrs.frozen(kw_only=True)
class VsockConfig:
    """A vsock device. cid: the guest's address, 3 and up. uds_path: a unix socket on the host that takes
    ``CONNECT <port>`` lines, and whose name with ``_<port>`` behind it is where the guest's own connections go; None
    for none: then ``vm.vsock`` is the way.

    Raises ConfigError.
    """

    cid: int = attrs.field(default=3, validator=_within("vsock cid", _LEAST_CID, _MOST_CID))
    uds_path: Path | None = attrs.field(default=None, converter=_optional_path)


@attrs.frozen(kw_only=True)
class RngConfig:
    """An entropy device, fed by getrandom(2). bytes_per_s, burst_bytes: what the guest can take at the most; 0 for no
    limit.

    Raises ConfigError.
    """

    bytes_per_s: int = attrs.field(default=1 << 20, validator=_within("entropy rate", 0, 1 << 40))
    burst_bytes: int = attrs.field(default=1 << 16, validator=_within("entropy burst", 0, 1 << 40))


def _names(value: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError("console ports", expected="a sequence of names", found=repr(value))
    return tuple(value)


@attrs.frozen(kw_only=True)
class ConsoleConfig:
    """A virtio console, /dev/hvc0 in the guest, and further byte streams: each name in ``ports`` is one, which the
    guest has as /dev/virtio-ports/NAME (or /dev/vport*) and the host as ``vm.ports[NAME]``; hvc0 is named
    ``console``.

    Raises ConfigError.
    """

    ports: tuple[str, ...] = attrs.field(default=(), converter=_names)

    @ports.validator
    def _check_ports(self, _: object, value: tuple[str, ...]) -> None:
        for name in value:
            if not isinstance(name, str) or not _ID.fullmatch(name):
                raise ConfigError("console port", expected="1 to 20 letters, digits, dots, dashes", found=repr(name))
        if len(value) > MAX_PORTS or len(set(value)) != len(value) or "console" in value:
            raise ConfigError("console ports", expected=f"at most {MAX_PORTS} different names", found=value)


def to_record(what: str, kind: type[R], value: object) -> R | None:
    """What a caller may write for a device: None or False for none, True for the default one, or its record."""
    if value is None or value is False or isinstance(value, kind):
        return value or None
    if value is True:
        return kind()
    raise ConfigError(what, expected=f"True, False or a {kind.__name__}", found=repr(value))


def to_net(value: object) -> NetConfig | None:
    """``"none"``, ``"user"`` or a NetConfig."""
    if value is None or value == "none":
        return None
    if value == "user":
        return NetConfig()
    if isinstance(value, NetConfig):
        return value
    raise ConfigError("net", expected='"none", "user" or a NetConfig', found=repr(value))


def to_drives(value: object) -> tuple[DriveConfig, ...]:
    """Drive records, or paths of images to write to; each gets an id. Raises ConfigError for two of one name."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError("drives", expected="a sequence of DriveConfig or paths", found=repr(value))
    drives = [entry if isinstance(entry, DriveConfig) else DriveConfig(path=entry) for entry in value]
    named = tuple(attrs.evolve(drive, id=drive.id or f"drive{index}") for index, drive in enumerate(drives))
    if len({drive.id for drive in named}) != len(named) or len(named) > MAX_DRIVES:
        raise ConfigError("drives", expected=f"at most {MAX_DRIVES}, of different ids", found=[d.id for d in named])
    if sum(drive.root for drive in named) > 1:
        raise ConfigError("drives", expected="one root at the most", found=[d.id for d in named if d.root])
    return named
