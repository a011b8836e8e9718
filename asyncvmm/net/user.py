"""A network without privileges: passt or gvproxy as a helper process, joined by QEMU's stream framing.

``start_user_net`` returns once the helper has answered. What it returns is the same for both machines: a connected
stream socket's descriptor, over which Ethernet frames go, each behind its length (see net.framing). passt, the better
one, is preferred: it inherits its end of a socket pair, and there is nothing on disk. gvproxy wants a socket file; that
is gone once the connection stands.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio
import attrs

from asyncvmm.device_config import NetConfig
from asyncvmm.errors import HostError
from asyncvmm.machine.waiting import in_thread, wait_out
from asyncvmm.net.addresses import MTU, Addresses, first_resolver, plan_addresses
from asyncvmm.net.framing import FrameBuffer, FramingError
from asyncvmm.net.gvproxy import LEAST_VERSION, gvproxy_command, gvproxy_config
from asyncvmm.net.helper import Helper
from asyncvmm.net.mac import draw_mac, format_mac, parse_mac
from asyncvmm.net.passt import passt_command, plan_dns
from asyncvmm.net.probe import arp_request, is_arp_reply

HelperName = Literal["passt", "gvproxy"]
T = TypeVar("T")

START_TIMEOUT_S: Final = 10.0
SOCKET_BUFFER: Final = 1 << 20
"""Asked for both directions of the wire, in bytes; the kernel cuts it down to what it allows."""

_POLL_S: Final = 0.002
_RESOLV_CONFS: Final = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


@attrs.frozen
class _Survey:
    name: HelperName
    path: str
    resolver: IPv4Address | None
    help_text: str


class UserNet:
    """A user-mode network that runs.

    fd: our end of the wire. helper: which program; pid: its process. mac: the card's address. guest, gateway, dns: the
    addresses the guest has (DHCP says the same); dns is None where the host has no resolver. mtu: of the wire.
    start_ns: what starting took. ended: set when the helper has ended.
    """

    def __init__(
        self,
        process: Helper,
        wire: socket.socket,
        *,
        helper: HelperName,
        mac: str,
        addresses: Addresses,
        dns: IPv4Address | None,
        start_ns: int,
    ) -> None:
        self._process, self._wire = process, wire
        self.helper = helper
        self.pid = process.pid
        self.mac = mac
        self.guest: IPv4Interface = addresses.guest
        self.gateway = addresses.gateway
        self.dns = dns
        self.mtu = MTU
        self.start_ns = start_ns
        self.ended = process.ended

    @property
    def fd(self) -> int:
        """Our end of the wire; -1 once it is closed."""
        return self._wire.fileno()

    def failure(self) -> HostError:
        """How the helper ended."""
        return self._process.failure()

    async def aclose(self) -> None:
        """Kill the helper, reap it, close the wire. May be called again."""
        self._wire.close()
        await self._process.stop()


async def start_user_net(config: NetConfig, mac: str | None = None) -> UserNet:
    """Start a helper for the card of address ``mac`` (None: the one of ``config``, or a drawn one).

    Cancelled, it leaves nothing behind. Raises ConfigError for addresses that do not fit together, and HostError where
    there is no helper or where it does not start; the error has its last words.
    """
    card = parse_mac(mac or config.mac or format_mac(draw_mac()))
    addresses = plan_addresses(config)
    start = time.monotonic_ns()
    survey = await in_thread(_survey)
    launch = _launch_passt if survey.name == "passt" else _launch_gvproxy
    async with AsyncExitStack() as undo:
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                process, wire, dns = await launch(undo, survey, config, format_mac(card), addresses)
                await _unless_it_ends(process, _first_answer(wire, card, addresses))
        except TimeoutError:
            raise HostError(survey.name, expected=f"an answer within {START_TIMEOUT_S:.0f} s", found="none") from None
        undo.pop_all()
    return UserNet(
        process,
        wire,
        helper=survey.name,
        mac=format_mac(card),
        addresses=addresses,
        dns=dns,
        start_ns=time.monotonic_ns() - start,
    )


def _survey() -> _Survey:
    """Which helper there is, and what the host resolves names with. Raises HostError."""
    resolver = _host_resolver()
    if path := shutil.which("passt"):
        helped = resolver is not None and resolver.is_loopback
        return _Survey("passt", path, resolver, _help_of(path) if helped else "")
    if path := shutil.which("gvproxy"):
        return _Survey("gvproxy", path, resolver, "")
    raise HostError(
        "user network",
        expected=f"passt on PATH (Debian: apt install passt), or gvproxy {LEAST_VERSION} or later",
        found="neither",
    )


def _host_resolver() -> IPv4Address | None:
    """The host's resolver; behind one on its loopback, the one that a systemd-resolved asks itself."""
    found = [resolver for path in _RESOLV_CONFS if (resolver := _resolver_of(path)) is not None]
    return next((resolver for resolver in found if not resolver.is_loopback), found[0] if found else None)


def _resolver_of(path: Path) -> IPv4Address | None:
    try:
        return first_resolver(path.read_text(errors="replace"))
    except OSError:
        return None


def _help_of(path: str) -> str:
    try:
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


_Launched = tuple[Helper, socket.socket, IPv4Address | None]


async def _launch_passt(
    undo: AsyncExitStack, survey: _Survey, config: NetConfig, mac: str, addresses: Addresses
) -> _Launched:
    dns, options = plan_dns(addresses, survey.resolver, survey.help_text)
    wire, peer = _socket_pair()
    undo.callback(wire.close)
    with peer:
        command = passt_command(survey.path, peer.fileno(), addresses, config.publish, options)
        process = await Helper.begin("passt", command, [peer.fileno()])
    undo.push_async_callback(process.stop)
    return process, wire, dns


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    try:
        ends = socket.socketpair()
    except OSError as error:
        raise HostError("socket pair", expected="two free descriptors", found=error.strerror) from error
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    ends[0].setblocking(False)
    return ends


async def _launch_gvproxy(
    undo: AsyncExitStack, survey: _Survey, config: NetConfig, mac: str, addresses: Addresses
) -> _Launched:
    directory = Path(tempfile.mkdtemp(prefix="asyncvmm-net-"))
    async with AsyncExitStack() as files:
        files.callback(shutil.rmtree, directory, ignore_errors=True)
        path = str(directory / "wire")
        settings = os.memfd_create("gvproxy")
        files.callback(os.close, settings)
        os.write(settings, gvproxy_config(path, mac, addresses, config.publish))
        process = await Helper.begin("gvproxy", gvproxy_command(survey.path, settings), [settings])
        undo.push_async_callback(process.stop)
        wire = await _unless_it_ends(process, _connect(undo, path))
    return process, wire, addresses.dns or addresses.gateway


async def _connect(undo: AsyncExitStack, path: str) -> socket.socket:
    """The connected socket, as soon as somebody accepts there. A local connect never waits for the peer."""
    while True:
        wire = socket.socket(socket.AF_UNIX)
        wire.setblocking(False)
        try:
            wire.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            wire.close()
            await anyio.sleep(_POLL_S)
        except OSError as error:
            wire.close()
            raise HostError("gvproxy's socket", expected="a connection", found=error.strerror) from error
        else:
            undo.callback(wire.close)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            return wire


async def _first_answer(wire: socket.socket, mac: bytes, addresses: Addresses) -> None:
    """Ask who the gateway is, and wait for the answer; frames before it are for a guest that is not there yet.

    Reads to the end of that answer and not one byte further.
    """
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(wire, arp_request(mac, addresses.guest.ip, addresses.gateway))
    frames = FrameBuffer()
    while True:
        size = await loop.sock_recv_into(wire, frames.space()[: frames.missing()])
        if not size:
            raise ConnectionResetError
        frames.fed(size)
        frame = frames.peek()
        if frame is not None:
            if is_arp_reply(frame, addresses.gateway):
                return
            frames.skip()


async def _unless_it_ends(process: Helper, waiting: Coroutine[Any, Any, T]) -> T:
    """What ``waiting`` gives. Raises HostError once the helper has ended."""
    task = asyncio.ensure_future(waiting)
    ended = asyncio.ensure_future(process.ended.wait())
    try:
        await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not isinstance(task.exception(), OSError | FramingError):
            return task.result()
        # A helper that dies closes its end first. One that closed it and lives on is of no use, either.
        process.kill()
        await ended
        raise process.failure()
    finally:
        task.cancel()
        ended.cancel()
        # They must be over before anybody closes what they wait for.
        await wait_out(asyncio.ensure_future(asyncio.wait([task, ended])))
