"""What a caller asks for beside processor and memory: DriveConfig, NetConfig, BalloonConfig, VsockConfig and so on.

Everything that can be checked without the host is checked here, at once. The same records serve both machines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import attrs

from asyncvmm.config import can_be_path
from asyncvmm.device_list import DeviceConfig as DeviceConfig
from asyncvmm.errors import ConfigError

CacheMode = Literal["writeback", "none", "unsafe"]
RootType = Literal["auto", "ext4", "squashfs", "erofs"]
NetMode = Literal["none", "user", "tap"]
Ipv4 = Literal["dhcp", "none"] | IPv4Interface

MAX_DRIVES = 8
"""Drives that can be asked for; the root of a guest image comes on top."""

MAX_PORTS = 15
"""Named ports of the virtio console beside port 0."""

MAX_UDS_PATH = 107 - len("_4294967295")
"""Longest ``uds_path``, bytes: sun_path of unix(7) must hold it with a port behind it and a NUL."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,19}")
_INTERFACE = re.compile(r"(?!\.{1,2}$)[!-~]{1,15}")
_NOT_IN_INTERFACE = frozenset("/:%")
"""The first two are no part of a name to Linux; the third would have it make up another one."""

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_NO_MAC = "00:00:00:00:00:00"
_MOST_PORT = 65535
_LEAST_CID, _MOST_CID = 3, 2**32 - 2

R = TypeVar("R")
Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _of(what: str, *kinds: type) -> Check:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{what} {attribute.name}", expected=kinds[0].__name__, found=repr(value))

    return check


def _path(what: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not can_be_path(str(value)) or Path(value) == Path():
        raise ConfigError(what, expected="a path that a file can have", found=repr(value))
    return Path(value)


def _image(value: str | Path) -> Path:
    return _path("drive path", value)


def _overlay(value: bool | str | Path) -> bool | Path:
    return value if isinstance(value, bool) else _path("drive overlay", value)


def _socket(value: str | Path | None) -> Path | None:
    return None if value is None else _path("vsock uds_path", value)


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

    path: Path = attrs.field(converter=_image)
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
        if self.overlay == self.path:
            raise ConfigError("drive overlay", expected="another file than its image", found=self.overlay)
        if self.root_type != "auto" and not self.root:
            raise ConfigError("root_type", expected="a drive with root=True", found=f"{self.root_type} without it")


def _ip(what: str, value: object) -> IPv4Address:
    try:
        if not isinstance(value, str | IPv4Address):
            raise ValueError
        return IPv4Address(value)
    except ValueError:
        raise ConfigError(what, expected="an IPv4 address", found=repr(value)) from None


def _host_address(value: str | IPv4Address) -> str:
    return str(_ip("published address", value))


@attrs.frozen(kw_only=True)
class Publish:
    """One guest TCP port made reachable on the host: ``host_address:host_port`` leads to ``guest_port``.

    Raises ConfigError.
    """

    host_port: int = attrs.field(validator=_within("published host port", 1, _MOST_PORT))
    guest_port: int = attrs.field(validator=_within("published guest port", 1, _MOST_PORT))
    host_address: str = attrs.field(default="127.0.0.1", converter=_host_address)

    def clashes_with(self, other: Publish) -> bool:
        """Whether both want the same host port: 0.0.0.0 stands for every address."""
        addresses = {self.host_address, other.host_address}
        return self.host_port == other.host_port and (len(addresses) == 1 or "0.0.0.0" in addresses)


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
    if value in ("dhcp", "none"):
        return "dhcp" if value == "dhcp" else "none"
    try:
        if not isinstance(value, IPv4Interface) and (not isinstance(value, str) or "/" not in value):
            raise ValueError
        interface = IPv4Interface(value)
    except ValueError:
        raise ConfigError("guest address", expected="dhcp, none or ADDRESS/PREFIX", found=repr(value)) from None
    if not _is_host(interface):
        raise ConfigError("guest address", expected="a host's address in its network", found=interface)
    return interface


def _is_host(interface: IPv4Interface) -> bool:
    ip, network = interface.ip, interface.network
    if ip.is_unspecified or ip.is_loopback or ip.is_multicast:
        return False
    return network.prefixlen > 30 or ip not in (network.network_address, network.broadcast_address)


def _gateway(value: str | IPv4Address | None) -> IPv4Address | None:
    return None if value is None else _ip("gateway", value)


def _dns(value: str | IPv4Address | None) -> IPv4Address | None:
    return None if value is None else _ip("dns", value)


@attrs.frozen(kw_only=True)
class NetConfig:
    """One network card.

    mode: ``user`` (a helper process without privileges, passt or gvproxy, whichever is found) or ``tap`` (an existing
    or new TAP interface ``tap``, which wants CAP_NET_ADMIN). mac: ``aa:bb:cc:dd:ee:ff``, None draws one. address:
    what PID 1 gives the card: ``dhcp``, ``none``, or ``ADDRESS/PREFIX``, with ``gateway`` and ``dns``; in ``user`` mode
    DHCP says these, too, and the host's resolver where ``dns`` is not given. publish: guest ports reachable on the
    host, in ``user`` mode.

    Raises ConfigError.
    """

    mode: NetMode = attrs.field(default="user", validator=_one_of("network mode", ("user", "tap")))
    tap: str | None = attrs.field(default=None)
    mac: str | None = attrs.field(default=None, converter=_lower)
    address: Ipv4 = attrs.field(default="dhcp", converter=_ipv4)
    gateway: IPv4Address | None = attrs.field(default=None, converter=_gateway)
    dns: IPv4Address | None = attrs.field(default=None, converter=_dns)
    publish: tuple[Publish, ...] = attrs.field(default=(), converter=_publishes)

    @tap.validator
    def _check_tap(self, _: object, value: object) -> None:
        if self.mode == "tap" and not _is_interface(value):
            raise ConfigError("tap", expected="an interface's name of at most 15 characters", found=repr(value))
        if self.mode == "user" and value is not None:
            raise ConfigError("tap", expected='none with mode="user"', found=repr(value))

    @mac.validator
    def _check_mac(self, _: object, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, str) or not _MAC.fullmatch(value) or int(value[:2], 16) & 1 or value == _NO_MAC:
            raise ConfigError("mac", expected="six hex bytes of a unicast address", found=repr(value))

    def __attrs_post_init__(self) -> None:
        if self.mode == "tap" and self.publish:
            raise ConfigError("published ports", expected='mode="user"', found="tap")
        if self.mode == "tap" and isinstance(self.address, str) and (self.gateway or self.dns):
            raise ConfigError("gateway and dns", expected="ADDRESS/PREFIX beside them", found=self.address)
        for one, other in combinations(self.publish, 2):
            if one.clashes_with(other):
                raise ConfigError("published ports", expected="each host port once", found=f"{one.host_port} twice")


def _is_interface(value: object) -> bool:
    return isinstance(value, str) and bool(_INTERFACE.fullmatch(value)) and _NOT_IN_INTERFACE.isdisjoint(value)


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
    uds_path: Path | None = attrs.field(default=None, converter=_socket)

    @uds_path.validator
    def _check_length(self, _: object, value: Path | None) -> None:
        size = len(str(value).encode("utf-8", "surrogateescape"))
        if value is not None and size > MAX_UDS_PATH:
            raise ConfigError("vsock uds_path", expected=f"at most {MAX_UDS_PATH} bytes", found=f"{size} bytes")


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
        if "console" in value:
            raise ConfigError("console port", expected="another name than hvc0's", found=repr("console"))
        if len(value) > MAX_PORTS or len(set(value)) != len(value):
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
    """Drive records, or paths of images to write to; each gets an id. Raises ConfigError."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ConfigError("drives", expected="a sequence of DriveConfig or paths", found=repr(value))
    drives = [entry if isinstance(entry, DriveConfig) else DriveConfig(path=entry) for entry in value]
    named = tuple(attrs.evolve(drive, id=drive.id or f"drive{index}") for index, drive in enumerate(drives))
    if len(named) > MAX_DRIVES:
        raise ConfigError("drives", expected=f"at most {MAX_DRIVES}", found=len(named))
    if len({drive.id for drive in named}) != len(named):
        raise ConfigError("drives", expected="different ids", found=[drive.id for drive in named])
    overlays = [drive.overlay for drive in named if isinstance(drive.overlay, Path)]
    if len(set(overlays)) != len(overlays):
        raise ConfigError("drives", expected="an overlay each", found=[str(path) for path in overlays])
    if sum(drive.root for drive in named) > 1:
        raise ConfigError("drives", expected="one root at the most", found=[d.id for d in named if d.root])
    return named
