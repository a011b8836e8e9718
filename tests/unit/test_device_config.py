"""The records of devices refuse at once what no host could give, and say what was expected and found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.config import VMConfig
from asyncvmm.device_config import (
    MAX_DRIVES,
    MAX_PORTS,
    MAX_UDS_PATH,
    BalloonConfig,
    ConsoleConfig,
    DeviceConfig,
    DriveConfig,
    NetConfig,
    Publish,
    RngConfig,
    VsockConfig,
)
from asyncvmm.errors import ConfigError
from asyncvmm.x86.layout import mmio_device

SURROGATE = "\ud800"
NO_PATHS = ("", ".", Path(), "a\0b", SURROGATE, b"image", 5, None, ["image"])
NO_NAMES = ("", "a b", "a/b", "a,b", "a\n", "a\0", "-a", "é", SURROGATE, "x" * 21, b"a", 5)

REFUSED: dict[type[Any], dict[str, tuple[Any, ...]]] = {
    DriveConfig: {
        "path": NO_PATHS,
        "id": NO_NAMES,
        "read_only": (1, 0, "no", None),
        "root": (1, "yes", None),
        "discard": (0, "yes"),
        "overlay": (1, *NO_PATHS),
        "root_type": ("xfs", "", None, ["ext4"], 5),
        "cache": ("writethrough", "", None, {}, True),
    },
    Publish: {
        "host_port": (0, -1, 65536, True, "80", 80.0, None),
        "guest_port": (0, 65536, False, "80", None),
        "host_address": ("", "localhost", "1.2.3", "1.2.3.4 ", "::1", SURROGATE, 5, True, None, b"abcd"),
    },
    NetConfig: {
        "mode": ("none", "bridge", "", None, True, ["user"]),
        "tap": ("tap0", 5, True),
        "mac": (
            "",
            "aa:bb:cc:dd:ee",
            "aa:bb:cc:dd:ee:ff:00",
            "aa-bb-cc-dd-ee-ff",
            "aa:bb:cc:dd:ee:fg",
            "aa:bb:cc:dd:ee:f\u0661",
            "aa:bb:cc:dd:ee:ff\n",
            "01:00:00:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            b"\xaa" * 6,
            5,
        ),
        "address": (
            "",
            "static",
            "10.0.0.5",
            "10.0.0.5/33",
            "10.0.0.256/24",
            "10.0.0.0/24",
            "10.0.0.255/24",
            "0.0.0.0/0",
            "127.0.0.1/8",
            "224.0.0.1/24",
            IPv4Interface("10.0.0.255/24"),
            IPv4Address("10.0.0.5"),
            "fe80::1/64",
            SURROGATE,
            None,
            5,
            [],
        ),
        "gateway": ("", "here", "10.0.0.1/24", 5, True, b"abcd", []),
        "dns": ("", "dns.example", 5, False, "::1"),
        "publish": ("80:80", b"80", 80, None, [80], [(80,)], [(80, 80, 80)], [("80", "80")], [[80, 80]], [(True, 80)]),
    },
    BalloonConfig: {
        "mib": (-1, 1 << 40, True, 1.5, "1", None),
        "deflate_on_oom": (1, None),
        "stats_interval_s": (-1, 86401, 0.5, True, None),
        "free_page_reporting": (1, "no"),
        "free_page_hinting": (0, None),
    },
    VsockConfig: {
        "cid": (0, 1, 2, 2**32 - 1, 2**32, True, "3", 3.0, None),
        "uds_path": ("", "a\0b", SURROGATE, b"path", 5, "x" * (MAX_UDS_PATH + 1), "ü" * (MAX_UDS_PATH // 2 + 1)),
    },
    RngConfig: {
        "bytes_per_s": (-1, 1.5, True, "1", None, 1 << 41),
        "burst_bytes": (-1, 1.5, True, "1", None, 1 << 41),
    },
    ConsoleConfig: {
        "ports": (
            "data",
            b"data",
            5,
            None,
            ["console"],
            ["a", "a"],
            [str(number) for number in range(MAX_PORTS + 1)],
            *([name] for name in NO_NAMES),
        ),
    },
    VMConfig: {
        "drives": (
            None,
            "image",
            b"image",
            Path("image"),
            5,
            [5],
            [""],
            ["image"] * (MAX_DRIVES + 1),
        ),
        "net": (True, False, "tap", "", [], 5),
        "balloon": (5, 0, "100", RngConfig(), BalloonConfig(mib=257)),
        "vsock": (3, "path", BalloonConfig()),
        "rng": (1, "yes", []),
        "virtio_console": ("data", ["data"], 1),
        "acpi": (1, None),
        "metrics_interval_s": (0, -1, 86401, True, "60", None, float("nan"), float("inf")),
    },
}
NEEDED: dict[type[Any], dict[str, Any]] = {DriveConfig: {"path": "image"}, Publish: {"host_port": 1, "guest_port": 1}}
CASES = [
    pytest.param(kind, name, value, id=f"{kind.__name__}.{name}={value!r:.40}")
    for kind, fields in REFUSED.items()
    for name, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_what_no_device_can_have_is_refused_with_what_was_found(kind: type[Any], name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{**NEEDED.get(kind, {}), name: value})
    assert caught.value.expected
    assert caught.value.found is not None
    assert "\n" not in str(caught.value)


def test_every_field_of_every_record_is_tried() -> None:
    for kind in (DriveConfig, Publish, NetConfig, BalloonConfig, VsockConfig, RngConfig, ConsoleConfig):
        assert REFUSED[kind].keys() == {field.name for field in attrs.fields(kind)}


# -- what does not go together -----------------------------------------------------------------------------------------

TOGETHER: dict[str, tuple[Callable[[], object], str]] = {
    "an overlay of what cannot be written": (
        lambda: DriveConfig(path="image", read_only=True, overlay=True),
        "drive overlay: expected a drive that can be written, found read_only",
    ),
    "an overlay that is its image": (lambda: DriveConfig(path="image", overlay="./image"), "another file"),
    "a root's type without a root": (lambda: DriveConfig(path="image", root_type="ext4"), "root=True"),
    "two drives of one id": (
        lambda: VMConfig(drives=[DriveConfig(path="a", id="drive1"), "b"]),
        r"different ids, found \['drive1', 'drive1'\]",
    ),
    "two roots": (
        lambda: VMConfig(drives=[DriveConfig(path="a", root=True), DriveConfig(path="b", root=True)]),
        "one root at the most",
    ),
    "two drives of one overlay": (
        lambda: VMConfig(drives=[DriveConfig(path=path, overlay="o") for path in ("a", "b")]),
        "an overlay each",
    ),
    "a TAP without a name": (lambda: NetConfig(mode="tap"), "an interface's name"),
    "ports published by a TAP": (
        lambda: NetConfig(mode="tap", tap="tap0", publish=[(80, 80)]),
        'published ports: expected mode="user", found tap',
    ),
    "a gateway that nobody would tell": (
        lambda: NetConfig(mode="tap", tap="tap0", gateway="10.0.0.1"),
        "ADDRESS/PREFIX beside them, found dhcp",
    ),
    "one host port twice": (lambda: NetConfig(publish=[(80, 80), (80, 81)]), "each host port once, found 80 twice"),
    "one host port on one address and on all": (
        lambda: NetConfig(publish=[(80, 80), Publish(host_port=80, guest_port=80, host_address="0.0.0.0")]),
        "80 twice",
    ),
    "a balloon larger than the guest": (
        lambda: VMConfig(memory_mib=64, balloon=BalloonConfig(mib=65)),
        "at most 64 MiB, found 65 MiB",
    ),
}


@pytest.mark.parametrize(("make", "match"), TOGETHER.values(), ids=TOGETHER.keys())
def test_what_does_not_go_together_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a:b", "tap%d", "a b", "a\0b", "a\x1b", "é", SURROGATE, "x" * 16]
)
def test_a_name_that_no_interface_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="tap"):
        NetConfig(mode="tap", tap=name)


# -- what may be written for what --------------------------------------------------------------------------------------


def test_nothing_asked_for_is_no_device() -> None:
    config = VMConfig()
    assert config.devices == DeviceConfig()
    assert (config.devices.count, config.has_devices) == (0, False)


def test_true_is_the_default_device_and_false_is_none() -> None:
    config = VMConfig(balloon=True, vsock=False, rng=True, virtio_console=True, net="user")
    assert config.devices == DeviceConfig(
        net=NetConfig(), balloon=BalloonConfig(), rng=RngConfig(), console=ConsoleConfig()
    )
    assert (config.devices.count, config.has_devices) == (4, True)
    assert VMConfig(net="none").net is None


def test_drives_may_be_paths_and_get_ids_by_their_place() -> None:
    config = VMConfig(drives=["a", DriveConfig(path="b", id="data"), Path("c")])
    assert [(drive.id, drive.path) for drive in config.drives] == [
        ("drive0", Path("a")),
        ("data", Path("b")),
        ("drive2", Path("c")),
    ]


def test_a_path_that_is_no_utf8_is_taken_as_the_system_has_it() -> None:
    assert DriveConfig(path="caf\udce9").path == Path("caf\udce9")


def test_network_addresses_become_what_they_are() -> None:
    net = NetConfig(address="10.0.0.5/24", gateway="10.0.0.1", dns=IPv4Address("9.9.9.9"), mac="AA:BB:CC:DD:EE:FF")
    assert (net.address, net.gateway) == (IPv4Interface("10.0.0.5/24"), IPv4Address("10.0.0.1"))
    assert (net.dns, net.mac) == (IPv4Address("9.9.9.9"), "aa:bb:cc:dd:ee:ff")


@pytest.mark.parametrize("address", ["10.0.0.4/31", "10.0.0.4/32", "dhcp", "none"])
def test_an_address_without_a_broadcast_one_is_a_hosts(address: str) -> None:
    assert str(NetConfig(address=address).address) == address


def test_ports_may_be_pairs() -> None:
    net = NetConfig(publish=[(8080, 80), Publish(host_port=8080, guest_port=81, host_address="127.0.0.2")])
    assert [(entry.host_address, entry.host_port, entry.guest_port) for entry in net.publish] == [
        ("127.0.0.1", 8080, 80),
        ("127.0.0.2", 8080, 81),
    ]


def test_a_socket_path_may_be_as_long_as_leaves_room_for_a_port() -> None:
    assert VsockConfig(uds_path="x" * MAX_UDS_PATH).uds_path == Path("x" * MAX_UDS_PATH)


def test_all_devices_that_can_be_asked_for_at_once_have_a_place() -> None:
    """And a guest image's root beside them."""
    drives = [f"image{index}" for index in range(MAX_DRIVES)]
    config = VMConfig(drives=drives, net="user", balloon=True, vsock=True, rng=True, virtio_console=True)
    assert mmio_device(config.devices.count + 1 - 1).gsi <= 23


ANYTHING: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.characters(categories=["Cs"]),
    st.binary(max_size=8),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.ip_addresses(),
)


@given(st.sampled_from(list(REFUSED)), st.data())
def test_whatever_is_written_there_is_a_record_or_a_refusal(kind: type[Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(REFUSED[kind])))
    value = data.draw(ANYTHING)
    with suppress(ConfigError):
        hash(kind(**{**NEEDED.get(kind, {}), name: value}))


def test_a_port_of_the_consoles_own_name_is_refused_for_its_name() -> None:
    with pytest.raises(ConfigError, match="another name than hvc0's, found 'console'"):
        ConsoleConfig(ports=("data", "console"))
