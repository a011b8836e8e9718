"""The second initramfs archive: it tells PID 1 what to run, and where. The kernel unpacks it over the first one.

/asyncvmm/run/argv           the words, each ended by a NUL
/asyncvmm/run/env            NAME=value, each ended by a NUL
/asyncvmm/run/arm-pre-exec   exists if PID 1 is to wait for ``go`` before the exec
/asyncvmm/run/root           ``<device> <type|auto> <ro|rw>``: the file system to run it in
/asyncvmm/run/net            ``<interface> dhcp``, or ``<interface> <address>/<prefix> [gateway=<ip>] [dns=<ip>]``
/asyncvmm/run/ports          virtio console ports to wait for, one name a line
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface

import attrs

from asyncvmm.errors import ConfigError
from asyncvmm.guest import cpio

MAX_BYTES = 128 * 1024 - 2
"""Most bytes of all words together, NULs included: PID 1's buffer."""

MAX_WORDS = 4096
"""Most words PID 1 takes."""

ROOT_TYPES = ("auto", "ext4", "squashfs", "erofs")
"""File systems that PID 1 makes a root of; ``auto`` looks which one it is."""

_DEVICE = re.compile(r"[a-z][a-z0-9]{0,31}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_PORT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,19}")


def _matching(what: str, pattern: re.Pattern[str], value: object) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(what, expected=f"a name like {pattern.pattern}", found=repr(value))


@attrs.frozen
class RootMount:
    """The workload's root: ``device`` is a name in the guest's /dev, ``fstype`` one of ``ROOT_TYPES``.

    With ``read_only``, and for squashfs and erofs, writes go to a tmpfs over it. Raises ConfigError.
    """

    device: str
    fstype: str = "auto"
    read_only: bool = False

    def __attrs_post_init__(self) -> None:
        _matching("root device", _DEVICE, self.device)
        if self.fstype not in ROOT_TYPES:
            raise ConfigError("root type", expected=" or ".join(ROOT_TYPES), found=repr(self.fstype))


def _address(value: str | IPv4Interface) -> str:
    if value == "dhcp":
        return "dhcp"
    try:
        if isinstance(value, str) and "/" not in value:
            raise ValueError
        return IPv4Interface(value).with_prefixlen
    except ValueError:
        raise ConfigError("guest address", expected="dhcp or ADDRESS/PREFIX", found=repr(value)) from None


def _ip(value: str | IPv4Address | None) -> str | None:
    try:
        return None if value is None else str(IPv4Address(value))
    except ValueError:
        raise ConfigError("guest network", expected="an IPv4 address", found=repr(value)) from None


@attrs.frozen
class GuestNet:
    """What PID 1 gives a network card: ``address`` is ``dhcp`` or ``ADDRESS/PREFIX``; the rest goes with the latter.

    Raises ConfigError.
    """

    interface: str = "eth0"
    address: str = attrs.field(default="dhcp", converter=_address)
    gateway: str | None = attrs.field(default=None, converter=_ip)
    dns: str | None = attrs.field(default=None, converter=_ip)

    def __attrs_post_init__(self) -> None:
        _matching("guest interface", _INTERFACE, self.interface)
        if self.address == "dhcp" and (self.gateway or self.dns):
            raise ConfigError("guest network", expected="no gateway and no dns with dhcp", found="one")


def workload_archive(
    argv: Sequence[str],
    env: Sequence[str] = (),
    *,
    arm_pre_exec: bool = False,
    root: RootMount | None = None,
    net: GuestNet | None = None,
    ports: Sequence[str] = (),
) -> bytes:
    """The archive that makes PID 1 run ``argv``, with ``env`` on top of its defaults; empty if it has nothing to do.

    With ``root`` it runs there, with ``net`` behind that network. PID 1 waits, for a second at most each, until
    ``ports`` are in /dev/virtio-ports. All of that is done before READY, and without a workload, too.

    Raises ConfigError for words with a NUL, too many or too long words, an ``env`` word that is not NAME=value, an
    armed pre-exec window without a workload, and a port's name that is none.
    """
    if arm_pre_exec and not argv:
        raise ConfigError("pre-exec window", expected="a workload to hold", found="none")
    entries = [*_workload(argv, env, arm_pre_exec), *_surroundings(root, net, ports)]
    return cpio.write(entries) if entries else b""


def _workload(argv: Sequence[str], env: Sequence[str], arm_pre_exec: bool) -> Iterator[cpio.Entry]:
    if not argv:
        return
    if not argv[0]:
        raise ConfigError("workload", expected="a program's name", found="an empty word")
    for word in env:
        if word.find("=") < 1:
            raise ConfigError("environment", expected="NAME=value", found=repr(word))
    yield cpio.file("asyncvmm/run/argv", _words("workload", argv))
    yield cpio.file("asyncvmm/run/env", _words("environment", env))
    if arm_pre_exec:
        yield cpio.file("asyncvmm/run/arm-pre-exec", b"")


def _surroundings(root: RootMount | None, net: GuestNet | None, ports: Sequence[str]) -> Iterator[cpio.Entry]:
    if root is not None:
        words = (root.device, root.fstype, "ro" if root.read_only else "rw")
        yield _line("root", words)
    if net is not None:
        gateway = (f"gateway={net.gateway}",) if net.gateway else ()
        dns = (f"dns={net.dns}",) if net.dns else ()
        yield _line("net", (net.interface, net.address, *gateway, *dns))
    for name in ports:
        _matching("console port", _PORT, name)
    if ports:
        yield cpio.file("asyncvmm/run/ports", "".join(f"{name}\n" for name in ports).encode())


def _line(name: str, words: Sequence[str]) -> cpio.Entry:
    return cpio.file(f"asyncvmm/run/{name}", f"{' '.join(words)}\n".encode())


def _words(what: str, words: Sequence[str]) -> bytes:
    if any("\0" in word for word in words):
        raise ConfigError(what, expected="words without NUL", found="a NUL")
    if len(words) > MAX_WORDS:
        raise ConfigError(what, expected=f"at most {MAX_WORDS} words", found=len(words))
    text = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    if len(text) > MAX_BYTES:
        raise ConfigError(what, expected=f"at most {MAX_BYTES} bytes", found=len(text))
    return text
