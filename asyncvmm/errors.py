"""Every error asyncvmm raises, as one tree. Each carries facts, not prose.

    AsyncVMMError
    ├── ConfigError            refused before anything was started (also a ValueError)
    │   ├── KernelError        the kernel file: missing, unreadable, not a kernel, truncated, out of place
    │   ├── InitrdError        the initrd: missing, unreadable, does not fit
    │   ├── CmdlineError       the kernel command line: too long, a NUL in it
    │   ├── MemorySizeError    guest memory: zero, or more than the host has
    │   ├── VcpuCountError     vCPUs: zero, or more than the accelerator offers
    │   └── ImageError         a guest image: unknown, damaged, or not to be built here
    ├── HostError              the host lacks what was asked for
    │   ├── KvmUnavailable     no /dev/kvm, no permission, wrong API version
    │   ├── QemuUnavailable    no qemu-system-x86_64, or one that is too old
    │   ├── KvmIoctlError      the kernel refused an ioctl
    │   ├── TapError           a TAP interface: no permission, somebody else's, no such device file
    │   └── DriveError         a drive's image: missing, not to be opened, of no use as a disk
    │       └── DriveBusy      somebody else uses it in a way that does not go together
    ├── StateError             the call does not fit the state the VM is in
    ├── VsockConnectError      no connection to a port of the guest (also an OSError)
    │   ├── VsockRefused       nobody listens there
    │   └── VsockTimeout       no answer in time
    ├── MachineError           the backend failed underneath the guest (a QEMU child that died, QMP)
    ├── SnapshotError          a snapshot cannot be taken or used; there is none
    │   ├── SnapshotFailed     it could not be taken: no room, a path that is taken, a machine that cannot
    │   ├── SnapshotDamaged    it is not whole: truncated, bits flipped, files missing, sizes that lie
    │   ├── SnapshotMismatch   it is whole, but not for here: another version, machine, CPU or base
    │   └── TriggerImpossible  what it was to wait for cannot come any more
    └── GuestError             the guest did something that ends what was awaited
        ├── BootError          it did not become ready; carries the evidence
        └── GuestStopped       it stopped before the awaited event came

``str(error)`` is one line: what was wrong, then ``expected …, found …`` where both are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncvmm.effects import ExitStatistics


class AsyncVMMError(Exception):
    """Base of the tree. ``expected``, ``found`` and ``state`` are the facts, None where they do not apply."""

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        state: str | None = None,
    ) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.state = state
        super().__init__(what)

    def __str__(self) -> str:
        parts = []
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.state is not None:
            parts.append(f"state {self.state}")
        return f"{self.what}: {', '.join(parts)}" if parts else self.what

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ConfigError(AsyncVMMError, ValueError):
    """What was asked for cannot be; nothing was started."""


class KernelError(ConfigError):
    """The kernel file cannot be booted."""


class InitrdError(ConfigError):
    """The initrd cannot be given to the guest."""


class CmdlineError(ConfigError):
    """The kernel command line cannot be given to the guest."""


class MemorySizeError(ConfigError):
    """Guest memory of that size cannot be had."""


class VcpuCountError(ConfigError):
    """That many vCPUs cannot be had."""


class ImageError(ConfigError):
    """The guest image is unknown, damaged, or cannot be built here."""


class HostError(AsyncVMMError):
    """The host lacks what was asked for."""


class KvmUnavailable(HostError):
    """KVM cannot be used on this host."""


class QemuUnavailable(HostError):
    """QEMU cannot be used on this host."""


class KvmIoctlError(HostError):
    """The kernel refused a KVM ioctl; ``ioctl`` is its name in the KVM API, ``errno`` the reason."""

    def __init__(self, ioctl: str, errno: int, reason: str) -> None:
        self.ioctl = ioctl
        self.errno = errno
        super().__init__(f"{ioctl} failed", expected="success", found=f"errno {errno} ({reason})")


class TapError(HostError):
    """A TAP interface cannot be had; ``errno`` is the reason, None where the kernel gave none."""

    errno: int | None = None


class DriveError(HostError):
    """A drive's image cannot be used: missing, not to be opened, of no use as a disk."""


class DriveBusy(DriveError):
    """Somebody else uses the image in a way that does not go together with what was asked for."""


class VsockConnectError(AsyncVMMError, OSError):
    """No connection came about. ``port`` is the guest's."""

    def __init__(self, what: str, *, port: int, expected: object = None, found: object = None) -> None:
        self.port = port
        super().__init__(what, expected=expected, found=found)


class VsockRefused(VsockConnectError, ConnectionRefusedError):
    """The guest refused it: nobody listens on that port, or no more connections are to be had."""


class VsockTimeout(VsockConnectError, TimeoutError):
    """The guest did not answer in time; it may have no driver for the device, or not yet."""


class StateError(AsyncVMMError):
    """The call does not fit the state the VM is in."""


class MachineError(AsyncVMMError):
    """The machine underneath the guest failed. ``retryable``: the same may succeed a moment later (contention)."""

    retryable: bool = False


class SnapshotError(AsyncVMMError):
    """A snapshot cannot be taken or used; of this kind itself where there is none."""


class SnapshotFailed(SnapshotError):
    """The snapshot could not be taken; nothing of it is left, and the VM is as it was."""


class SnapshotDamaged(SnapshotError):
    """The snapshot is not whole."""


class SnapshotMismatch(SnapshotError):
    """The snapshot is whole, but not for this host, this machine or this base."""


class TriggerImpossible(SnapshotError):
    """What the snapshot was to wait for cannot come any more."""


class GuestError(AsyncVMMError):
    """The guest ended, or never began, what was awaited.

    ``reason`` is one word (``panic``, ``triple-fault``, ``shutdown``, ``reset``, ``timeout``, ``stalled``,
    ``emulation-failure``, ``entry-failure``, ``machine``, ``init-error``); ``last_exit`` names the last KVM exit and
    ``rip`` is the instruction pointer then (both None on QEMU, which does not say); ``exits`` is the histogram,
    ``phases`` maps each host phase to its nanoseconds, those under way to what they took until then, ``serial_tail`` is
    the last 4 KiB of console output.
    """

    def __init__(
        self,
        what: str,
        *,
        reason: str,
        last_exit: str | None = None,
        rip: int | None = None,
        exits: ExitStatistics | None = None,
        phases: Mapping[str, int] | None = None,
        serial_tail: bytes = b"",
        expected: object = None,
        found: object = None,
        state: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, state=state)
        self.reason = reason
        self.last_exit = last_exit
        self.rip = rip
        self.exits = exits
        self.phases = dict(phases or {})
        self.serial_tail = serial_tail


class BootError(GuestError):
    """The guest did not become ready."""


class GuestStopped(GuestError):
    """The guest stopped before the awaited event came."""
