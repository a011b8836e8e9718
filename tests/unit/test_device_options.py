"""What the command line's words for devices mean, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from asyncvmm.config import VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, Publish, VsockConfig
from asyncvmm.device_options import DEFAULTS, device_options, device_records, parse_drive, parse_net, parse_publish
from asyncvmm.errors import ConfigError


def records(**words: Any) -> dict[str, Any]:
    return device_records(**{**DEFAULTS, **words})


# -- drives ------------------------------------------------------------------------------------------------------------


def test_a_drive_is_a_path_and_words() -> None:
    assert parse_drive("a.img") == DriveConfig(path="a.img")
    assert parse_drive("a.img,ro,root,root_type=erofs,id=sys") == DriveConfig(
        path="a.img", read_only=True, root=True, root_type="erofs", id="sys"
    )
    assert parse_drive("a.img,overlay,cache=none") == DriveConfig(path="a.img", overlay=True, cache="none")


@pytest.mark.parametrize(("text", "path"), [("a,,b", "a,b"), ("a,,,ro", "a,"), (",,,,", ",,"), ("a=b", "a=b")])
def test_a_comma_in_a_path_is_written_twice(text: str, path: str) -> None:
    drive = parse_drive(text)
    assert drive.path == Path(path)
    assert drive.read_only == text.endswith(",ro")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        ",ro",
        "a,",
        "a,rw",
        "a,RO",
        "a,ro=",
        "a,ro=yes",
        "a,id",
        "a,id=",
        "a,id=x y",
        "a,cache=fast",
        "a,root_type=ext4",
        "a,ro,ro",
        "a,id=x,id=y",
        "a,path=b",
        "a,ro,overlay",
        "a,overlay=b",
        "a\0b",
        "a,id=\0",
        "\ud800",
    ],
)
def test_what_is_no_drive_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_drive(text)
    assert "\n" not in str(caught.value)


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_network_is_a_mode_and_what_goes_with_it() -> None:
    assert parse_net("none", None, ()) is None
    assert parse_net("user", None, ()) == NetConfig()
    assert parse_net("tap=tap0", "10.0.0.5/24", ()) == NetConfig(mode="tap", tap="tap0", address="10.0.0.5/24")
    assert parse_net("user", "none", ["8080:80"]) == NetConfig(address="none", publish=[(8080, 80)])


@pytest.mark.parametrize(
    ("net", "address", "publish"),
    [
        ("", None, ()),
        ("none=", "dhcp", ()),
        ("none=x", None, ()),
        ("tap", None, ()),
        ("tap=", None, ()),
        ("tap=a/b", None, ()),
        ("tap=" + "x" * 16, None, ()),
        ("user=x", None, ()),
        ("bridge", None, ()),
        ("none", "dhcp", ()),
        ("none", "", ()),
        ("none", None, ("80:80",)),
        ("user", "", ()),
        ("user", "10.0.0.5", ()),
        ("user", None, ("80:80", "80:81")),
        ("tap=tap0", None, ("80:80",)),
    ],
)
def test_what_is_no_network_is_refused(net: str, address: str | None, publish: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        parse_net(net, address, publish)


def test_a_published_port_has_an_address_of_the_host_or_none() -> None:
    assert parse_publish("8080:80") == Publish(host_port=8080, guest_port=80)
    assert parse_publish("0.0.0.0:8080:80") == Publish(host_port=8080, guest_port=80, host_address="0.0.0.0")


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "::", "80", "80:", ":80", "a:80", "80:b", "0:80", "80:0", "65536:80", "80:65536", "-1:80", "+1:80"),
        *(
            "80 :80",
            "8_0:80",
            "٨٠:80",
            "1:2:3:4",
            "host:80:80",
            ":80:80",
            "[::1]:80:80",
            "999999999999:80",
            "1.2.3:80:80",
        ),
    ],
)
def test_what_is_no_published_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_publish(text)


# -- all together ------------------------------------------------------------------------------------------------------


def test_no_word_is_no_device() -> None:
    assert not VMConfig(**records()).has_devices


def test_every_word_is_its_device() -> None:
    config = VMConfig(
        **records(
            drives=("a", "b,ro"),
            net="user",
            balloon=64,
            vsock="/run/guest",
            rng=True,
            ports=("data", "log"),
            publish=(),
        )
    )
    assert config.devices.count == 7
    assert config.balloon == BalloonConfig(mib=64)
    assert config.vsock == VsockConfig(uds_path="/run/guest")
    assert config.virtio_console == ConsoleConfig(ports=("data", "log"))


def test_a_balloon_of_nothing_and_a_vsock_without_a_path_are_devices_too() -> None:
    config = VMConfig(**records(balloon=0, vsock="none"))
    assert (config.balloon, config.vsock) == (BalloonConfig(), VsockConfig())


@pytest.mark.parametrize(
    "words",
    [
        {"balloon": -1},
        {"balloon": 1 << 40},
        {"vsock": ""},
        {"vsock": "x" * 200},
        {"ports": ("",)},
        {"ports": ("a", "a")},
        {"ports": ("console",)},
        {"drives": ("a,id=x", "b,id=x")},
        {"drives": ("a",) * 9},
        {"drives": ("a,root", "b,root")},
    ],
)
def test_what_no_vm_can_have_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VMConfig(**records(**words))


def test_without_any_option_a_command_gets_the_defaults() -> None:
    """The command line tells by them that there is nothing to import."""
    found: dict[str, Any] = {}

    @click.command()
    @device_options
    def command(**options: Any) -> None:
        found.update(options)

    done = CliRunner().invoke(command, [])
    assert done.exit_code == 0
    assert found == DEFAULTS
