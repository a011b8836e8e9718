"""File descriptors of KVM and the ioctls on them.

ioctl goes through ctypes, never through ``fcntl.ioctl``: a kicked KVM_RUN returns EINTR, and CPython 3.14's fcntl
retries EINTR by itself, so that a kicked thread would never come back. ctypes releases the GIL around the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from asyncvmm.errors import KvmIoctlError, KvmUnavailable
from asyncvmm.machine.kvm.abi import Request

_IOCTL_TYPES = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)

raw_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
"""ioctl(2) with the GIL released: for calls that may take or wait. Gives -1 and ``ctypes.get_errno()``."""
raw_ioctl.argtypes = _IOCTL_TYPES

raw_ioctl_short = ctypes.PyDLL(None, use_errno=True).ioctl
"""ioctl(2) with the GIL kept: for calls of a microsecond, where giving it up could cost a whole switch interval."""
raw_ioctl_short.argtypes = _IOCTL_TYPES

DEV_KVM = Path("/dev/kvm")


def ioctl(fd: int, request: Request, argument: ctypes.Structure | ctypes.Array[ctypes.c_uint64] | int = 0) -> int:
    """Make one ioctl. Raises KvmIoctlError with its name and errno."""
    value = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = raw_ioctl(fd, request, value)
    if result < 0:
        number = ctypes.get_errno()
        raise KvmIoctlError(request.name, number, os.strerror(number))
    return result


def open_refused(path: Path, number: int) -> KvmUnavailable:
    """What this errno of open(2) means for the KVM device ``path``, and how to mend it."""
    expected, found = f"{path} opens", f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"
    if number == errno.ENOENT:
        expected, found = f"{path}", "no such file (load kvm_intel or kvm_amd; enable VT-x or SVM)"
    elif number in (errno.EACCES, errno.EPERM):
        expected, found = f"read and write access to {path}", "permission denied (join the kvm group)"
    return KvmUnavailable("KVM", expected=expected, found=found)


def check_extension(fd: int, capability: int) -> int:
    """KVM_CHECK_EXTENSION: 0 for absent, else 1 or the capability's number."""
    return ioctl(fd, Request.KVM_CHECK_EXTENSION, capability)
