"""User-mode networks with the real helpers: what comes through the wire, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from ipaddress import IPv4Address
from pathlib import Path

import anyio
import pytest

from asyncvmm.device_config import NetConfig, Publish
from asyncvmm.errors import HostError
from asyncvmm.net import user
from asyncvmm.net.framing import FrameBuffer, prefix
from asyncvmm.net.mac import parse_mac
from asyncvmm.net.user import UserNet, start_user_net
from tests.support.holdings import children
from tests.support.requirements import require

HELPERS = ("passt", "gvproxy")
MAC = "02:00:00:00:00:01"
ROOT = Path(__file__).parents[3]
DELAYS_S = (0.0, 0.001, 0.003, 0.006, 0.01, 0.015)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=HELPERS)
def helper(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One helper after the other, alone on PATH."""
    name = str(request.param)
    require(name)
    only(name, tmp_path, monkeypatch)
    return name


def only(name: str | None, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("setpriv", name):
        found = shutil.which(program) if program else None
        if found and program:
            (directory / program).symlink_to(found)
    monkeypatch.setenv("PATH", str(directory))


def free_port() -> int:
    with socket.socket() as anybody:
        anybody.bind(("127.0.0.1", 0))
        return int(anybody.getsockname()[1])


class Guest:
    """The other end of the wire, for a test that plays the guest. ``fd`` is not its own."""

    def __init__(self, net: UserNet) -> None:
        self._wire = socket.socket(fileno=os.dup(net.fd))
        self._wire.setblocking(False)
        self._frames = FrameBuffer()

    def send(self, frame: bytes) -> None:
        self._wire.sendall(prefix(len(frame)) + frame)

    async def frame(self) -> bytes:
        while (found := self._frames.peek()) is None:
            size = await asyncio.get_running_loop().sock_recv_into(self._wire, self._frames.space())
            assert size, "the helper closed the wire"
            self._frames.fed(size)
        frame = bytes(found)
        self._frames.skip()
        return frame

    async def frame_to_port(self, port: int) -> bytes:
        """The next TCP or UDP packet to a port of the guest's; answers to ARP meanwhile."""
        while True:
            frame = await self.frame()
            if frame[12:14] == b"\x08\x06" and frame[21] == 1:
                self.send(
                    frame[6:12] + parse_mac(MAC) + frame[12:21] + b"\x02" + parse_mac(MAC) + frame[38:42] + frame[22:32]
                )
            if frame[12:14] == b"\x08\x00" and struct.unpack(">H", frame[36:38])[0] == port:
                return frame

    def close(self) -> None:
        self._wire.close()


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def dhcp_discover() -> bytes:
    options = b"\x63\x82\x53\x63\x35\x01\x01\x37\x04\x01\x03\x06\x1a\xff"
    bootp = struct.pack(">BBBBIHH16s6s10s192s", 1, 1, 6, 0, 7, 0, 0x8000, b"", parse_mac(MAC), b"", b"") + options
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return b"\xff" * 6 + parse_mac(MAC) + b"\x08\x00" + header + udp


def dhcp_options(frame: bytes) -> dict[int, bytes]:
    found, rest = {}, frame[frame.index(b"\x63\x82\x53\x63") + 4 :]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        found[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    return found


def held() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            kinds[os.readlink(f"/proc/self/fd/{entry}").split(":")[0]] += 1
        except FileNotFoundError:
            continue
    kinds["children"] = len(children(os.getpid()))
    kinds["files"] = sum(name.startswith("asyncvmm-net-") for name in os.listdir(tempfile.gettempdir()))
    return kinds


async def test_the_guest_gets_its_address_by_dhcp_as_the_record_says(helper: str) -> None:
    net = await start_user_net(NetConfig(), MAC)
    guest = Guest(net)
    try:
        assert (net.helper, net.mac) == (helper, MAC)
        assert net.start_ns > 0
        with anyio.fail_after(5):
            guest.send(dhcp_discover())
            offer = await guest.frame_to_port(68)
        options = dhcp_options(offer)
        assert offer[58:62] == net.guest.ip.packed == bytes((10, 0, 2, 15))
        assert options[1] == bytes((255, 255, 255, 0))
        assert options[3] == net.gateway.packed
        assert options.get(6) == (net.dns.packed if net.dns else None)
        assert int.from_bytes(options[26], "big") == net.mtu
    finally:
        guest.close()
        await net.aclose()


async def test_a_connection_to_a_published_port_arrives_at_the_guests(helper: str) -> None:
    port = free_port()
    net = await start_user_net(NetConfig(publish=[Publish(host_port=port, guest_port=80)]), MAC)
    guest = Guest(net)
    client = socket.socket()
    client.setblocking(False)
    try:
        with anyio.fail_after(5):
            assert client.connect_ex(("127.0.0.1", port))
            syn = await guest.frame_to_port(80)
        assert syn[30:34] == net.guest.ip.packed
        assert syn[:6] == parse_mac(MAC)
        assert syn[47] & 2, "SYN"
    finally:
        client.close()
        guest.close()
        await net.aclose()


async def test_a_static_address_is_the_networks(helper: str) -> None:
    net = await start_user_net(NetConfig(address="192.168.77.9/24", gateway="192.168.77.3"), MAC)
    await net.aclose()
    assert (str(net.guest), str(net.gateway)) == ("192.168.77.9/24", "192.168.77.3")


async def test_a_published_port_that_is_taken_is_an_error_with_the_helpers_words(helper: str) -> None:
    before = held()
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(HostError, match=helper) as caught:
            await start_user_net(NetConfig(publish=[Publish(host_port=port, guest_port=80)]), MAC)
    assert str(port) in str(caught.value.found)
    assert held() == before


async def test_a_closed_network_leaves_nothing_behind(helper: str) -> None:
    before = held()
    net = await start_user_net(NetConfig(), MAC)
    await net.aclose()
    await net.aclose()
    assert net.fd == -1
    with pytest.raises(ProcessLookupError):
        os.kill(net.pid, 0)
    assert held() == before


async def test_a_start_can_be_cancelled_at_any_moment(helper: str) -> None:
    before = held()
    for delay in DELAYS_S:
        net = None
        with anyio.move_on_after(delay):
            net = await start_user_net(NetConfig(), MAC)
        if net is not None:
            await net.aclose()
        assert held() == before, f"cancelled after {delay} s"


async def test_a_helper_that_dies_is_known_at_once(helper: str) -> None:
    net = await start_user_net(NetConfig(), MAC)
    try:
        os.kill(net.pid, signal.SIGKILL)
        with anyio.fail_after(5):
            await net.ended.wait()
        assert "signal 9" in str(net.failure())
    finally:
        await net.aclose()


DOOMED = """
import anyio, os, sys
from asyncvmm.device_config import NetConfig
from asyncvmm.net.user import start_user_net
async def main():
    net = await start_user_net(NetConfig())
    print(net.pid, flush=True)
    await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_helper_dies_with_us(helper: str) -> None:
    doomed = await anyio.open_process([sys.executable, "-c", DOOMED], cwd=ROOT)
    assert doomed.stdout is not None
    with anyio.fail_after(20):
        pidfd = os.pidfd_open(int(await doomed.stdout.receive()))
        try:
            doomed.kill()
            await doomed.wait()
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
            await doomed.aclose()


RESOLVERS = [
    (b"", b"", None),
    (b"nameserver 10.0.0.1", b"nameserver 10.0.0.2", "10.0.0.1"),
    (b"nameserver 127.0.0.53", b"nameserver 10.0.0.2", "10.0.0.2"),
    (b"nameserver 127.0.0.1", b"", "10.0.2.1"),
]


@pytest.mark.requires("passt")
@pytest.mark.parametrize(("etc", "run", "expected"), RESOLVERS, ids=["none", "host", "systemd", "loopback"])
async def test_the_guests_resolver_is_one_it_can_reach(
    etc: bytes, run: bytes, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("passt", tmp_path, monkeypatch)
    paths = (tmp_path / "etc", tmp_path / "run")
    for path, content in zip(paths, (etc, run), strict=True):
        path.write_bytes(content)
    monkeypatch.setattr(user, "_RESOLV_CONFS", paths)
    net = await start_user_net(NetConfig(), MAC)
    await net.aclose()
    assert net.dns == (IPv4Address(expected) if expected else None)


@pytest.mark.requires("network-namespaces")
async def test_it_starts_on_a_host_without_any_network(helper: str) -> None:
    unshare = "/usr/bin/unshare"
    script = DOOMED.replace("await anyio.sleep_forever()", "await net.aclose()")
    done = await anyio.run_process([unshare, "-n", sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.STDOUT)
    assert done.stdout.strip().isdigit()


async def test_without_a_helper_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(None, tmp_path, monkeypatch)
    with pytest.raises(HostError, match="apt install passt"):
        await start_user_net(NetConfig())


async def test_a_helper_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "passt"
    silent.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(user, "START_TIMEOUT_S", 0.05)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = held()
    with pytest.raises(HostError, match="passt: expected an answer"):
        await start_user_net(NetConfig())
    assert held() == before
