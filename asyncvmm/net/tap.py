"""TAP interfaces: opening one by name, with a virtio header before each frame.

Facts: Linux, Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h; netdevice(7). An interface that is
not there is made, and goes with its descriptor; one made before (``ip tuntap add``) stays, and may belong to a user
without privileges. What it is connected to on the host, a bridge or routes, is the host's affair.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

from asyncvmm.errors import TapError

TUN_DEVICE: Final = "/dev/net/tun"

TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETVNETLE: Final = 0x400454DC
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914

IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_UP: Final = 0x0001

TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08

VNET_HEADER_SIZE: Final = 12
"""Of struct virtio_net_hdr_mrg_rxbuf, as virtio 1.2 has it before every frame."""

_IFREQ = struct.Struct("16sH22x")
_INT = struct.Struct("i")

_REASONS: Final = {
    errno.EPERM: "an interface of ours, or CAP_NET_ADMIN",
    errno.EACCES: "an interface of ours, or CAP_NET_ADMIN",
    errno.EBUSY: "an interface that nobody else has open",
    errno.EINVAL: "a TAP interface of one queue",
}


def open_tap(name: str) -> int:
    """A non-blocking descriptor of the TAP interface ``name``, which is up then; a virtio header of 12 bytes before
    each frame, no offloads. Close it with ``os.close``.

    Raises TapError: no such device file, no permission, somebody else has it, it is no TAP.
    """
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        expected = "the tun module, and read and write permission"
        raise _refusal(TUN_DEVICE, error, expected) from error
    try:
        _attach(fd, name)
        _bring_up(name)
    except OSError as error:
        os.close(fd)
        raise _refusal(f"TAP {name}", error, _REASONS.get(error.errno or 0, "an interface that can be used")) from error
    return fd


def set_offloads(fd: int, *, csum: bool, tso4: bool, tso6: bool, ecn: bool) -> None:
    """What whoever reads the TAP can take: frames without checksum, segments longer than the MTU. Raises TapError."""
    flags = csum * TUN_F_CSUM | tso4 * TUN_F_TSO4 | tso6 * TUN_F_TSO6
    flags |= (ecn and flags > TUN_F_CSUM) * TUN_F_TSO_ECN
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, flags)
    except OSError as error:
        raise _refusal("TUNSETOFFLOAD", error, f"offloads {flags:#x}") from error


def _attach(fd: int, name: str) -> None:
    fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(os.fsencode(name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, _INT.pack(VNET_HEADER_SIZE))
    fcntl.ioctl(fd, TUNSETVNETLE, _INT.pack(1))
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)


def _bring_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as anything:
        request = fcntl.ioctl(anything, SIOCGIFFLAGS, _IFREQ.pack(os.fsencode(name), 0))
        _, flags = _IFREQ.unpack(request)
        if not flags & IFF_UP:
            fcntl.ioctl(anything, SIOCSIFFLAGS, _IFREQ.pack(os.fsencode(name), flags | IFF_UP))


def _refusal(what: str, error: OSError, expected: str) -> TapError:
    refusal = TapError(what, expected=expected, found=error.strerror)
    refusal.errno = error.errno
    return refusal
