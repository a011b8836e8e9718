"""Addresses of a user-mode network, and the helpers' command lines made of them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.device_config import NetConfig, Publish
from asyncvmm.errors import ConfigError
from asyncvmm.net.addresses import first_resolver, plan_addresses
from asyncvmm.net.gvproxy import gvproxy_config
from asyncvmm.net.mac import draw_mac, format_mac, parse_mac
from asyncvmm.net.passt import passt_command, plan_dns

DEFAULT = plan_addresses(NetConfig())
LOOPBACK = IPv4Address("127.0.0.53")


def test_the_default_is_the_same_everywhere() -> None:
    assert (str(DEFAULT.guest), str(DEFAULT.gateway), DEFAULT.dns) == ("10.0.2.15/24", "10.0.2.2", None)


def test_a_static_address_brings_its_network() -> None:
    planned = plan_addresses(NetConfig(address="192.168.9.7/24", dns="9.9.9.9"))
    assert (str(planned.guest), str(planned.gateway), str(planned.dns)) == ("192.168.9.7/24", "192.168.9.1", "9.9.9.9")


@given(st.ip_addresses(v=4, network="10.0.0.0/8"), st.integers(8, 29))
def test_every_planned_address_is_another_hosts_of_the_network(address: IPv4Address, prefix: int) -> None:
    guest = IPv4Interface((address, prefix))
    try:
        planned = plan_addresses(NetConfig(address=str(guest)))
    except ConfigError:
        nobodys = guest.ip in (guest.network.network_address, guest.network.broadcast_address)
        assert nobodys or guest.ip.is_loopback or guest.ip.is_multicast or guest.ip.is_unspecified
        return
    for other in (planned.spare(), planned.spare(last=True)):
        assert len({planned.guest.ip, planned.gateway, other}) == 3
        assert other in guest.network
        assert other not in (guest.network.network_address, guest.network.broadcast_address)


@pytest.mark.parametrize(
    ("address", "gateway", "match"),
    [
        ("10.0.2.13/30", None, "at most 29"),
        ("10.0.2.0/24", None, "guest address"),
        ("10.0.2.255/24", None, "guest address"),
        ("10.0.2.15/24", "10.0.3.2", "gateway"),
        ("10.0.2.15/24", "10.0.2.15", "not the guest's"),
        ("10.0.2.15/24", "10.0.2.0", "gateway"),
    ],
)
def test_a_network_that_cannot_be_is_refused(address: str, gateway: str | None, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_addresses(NetConfig(address=address, gateway=gateway))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("# nameserver 1.1.1.1\nsearch x\n", None),
        ("nameserver fe80::1%eth0\nnameserver\nnameserver 10.0.0.1 \nnameserver 10.0.0.2", "10.0.0.1"),
        ("nameserver\t127.0.0.53\n", "127.0.0.53"),
        ("nameserver 1.2.3\n", None),
    ],
)
def test_the_first_resolver_of_a_resolv_conf(text: str, found: str | None) -> None:
    assert first_resolver(text) == (IPv4Address(found) if found else None)


def test_a_resolver_on_the_hosts_loopback_gets_a_stand_in() -> None:
    stand_in, options = plan_dns(DEFAULT, LOOPBACK, "")
    assert str(stand_in) == "10.0.2.1"
    assert options == ["--dns-forward", "10.0.2.1"]
    assert plan_dns(DEFAULT, LOOPBACK, "  --dns-host ADDR")[1][-2:] == ["--dns-host", "127.0.0.53"]


def test_a_resolver_elsewhere_is_the_guests_and_the_callers_wish_comes_first() -> None:
    resolver = IPv4Address("10.9.9.9")
    assert plan_dns(DEFAULT, resolver, "") == (resolver, ["--dns", "10.9.9.9"])
    assert plan_dns(DEFAULT, None, "") == (None, ["--dns", "none"])
    wish = plan_addresses(NetConfig(dns="9.9.9.9"))
    assert plan_dns(wish, resolver, "") == (wish.dns, ["--dns", "9.9.9.9"])


def test_passt_publishes_on_the_address_that_was_asked_for() -> None:
    publish = [Publish(host_port=8080, guest_port=80, host_address="0.0.0.0"), Publish(host_port=22, guest_port=22)]
    command = passt_command("passt", 7, DEFAULT, publish, [])
    assert command[-4:] == ["--tcp-ports", "0.0.0.0/8080:80", "--tcp-ports", "127.0.0.1/22:22"]


def test_passt_cannot_publish_two_guest_ports_on_one_host_port() -> None:
    publish = [
        Publish(host_port=80, guest_port=80, host_address="127.0.0.1"),
        Publish(host_port=80, guest_port=81, host_address="127.0.0.2"),
    ]
    with pytest.raises(ConfigError, match="80 and 81"):
        passt_command("passt", 7, DEFAULT, publish, [])


def test_gvproxy_is_told_everything() -> None:
    config = orjson.loads(gvproxy_config("/d/wire", "02:00:00:00:00:09", DEFAULT, [Publish(host_port=8, guest_port=9)]))
    assert config["interfaces"] == {"qemu": "unix:///d/wire"}
    stack = config["stack"]
    assert stack["dhcpStaticLeases"] == {"10.0.2.15": "02:00:00:00:00:09"}
    assert stack["forwards"] == {"127.0.0.1:8": "10.0.2.15:9"}
    assert stack["nat"] == {"10.0.2.254": "240.0.0.1"}, "the host's loopback is out of reach"


def test_drawn_macs_are_local_unicast_and_differ() -> None:
    macs = {draw_mac() for _ in range(50)}
    assert len(macs) == 50
    assert all(mac[0] & 3 == 2 for mac in macs)
    assert all(parse_mac(format_mac(mac)) == mac for mac in macs)


@pytest.mark.parametrize("text", ["", "01:00:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00", "zz:00:00:00:00:00"])
def test_what_is_no_cards_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mac"):
        parse_mac(text)
