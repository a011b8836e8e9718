"""What a machine must offer: the same few calls for every backend, plain records in, effects out.

A machine is driven by one VM object on one event loop. It never calls into that loop's code from another thread:
``on_effects`` is called on the loop, in the order in which the guest caused the effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

from asyncvmm.device_list import DeviceConfig
from asyncvmm.effects import Effect, ExitStatistics, Port

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from asyncvmm.balloon import BalloonBackend
    from asyncvmm.device_config import DriveConfig
    from asyncvmm.machine.saved import RestorePlan, SavedMachine
    from asyncvmm.snapshot.memory_writer import MemoryWriter
    from asyncvmm.storage.overlay import Overlay
    from asyncvmm.timing.tsc import GuestTime
    from asyncvmm.vsock.host import VsockHost

AccelName = Literal["kvm", "qemu"]

EffectSink = Callable[[Sequence[Effect]], None]
"""Takes one batch of effects, on the loop. Must not block and must not raise."""


@attrs.frozen
class DriveResource:
    """A drive as it is there: ``path`` is what the guest's reads and writes go to, the image or its overlay.

    ``overlay`` is that overlay; one of a machine in this process may have no name, and ``path`` is its base then.
    """

    config: DriveConfig
    path: Path
    format: Literal["raw", "mapped", "qcow2"] = "raw"
    overlay: Overlay | None = None


@attrs.frozen(kw_only=True)
class Resources:
    """What was made ready on the host for the plan's devices. The one who made it frees it, not the machine.

    ``drives`` are in the order of the configuration. ``net_fd`` is a helper's connected stream socket (each frame
    behind its length, 4 bytes, big-endian) or an open TAP, as ``net.mode`` says; ``mac`` is the card's address.
    """

    drives: tuple[DriveResource, ...] = ()
    net_fd: int | None = None
    mac: str | None = None


@attrs.frozen(kw_only=True)
class BootPlan:
    """What to boot, decided: files, bytes and numbers, nothing left to choose.

    ``name`` names threads and children. ``appended`` is a second cpio archive to stand behind ``initrd`` (empty for
    none; it starts on a 4-byte boundary). ``cmdline`` is the caller's text; a machine adds what its own devices need.
    ``tsc_khz`` is the host's TSC frequency, None where it is not known. ``devices`` are the virtio devices, and
    ``resources`` what they stand on. ``acpi`` False describes the hardware without ACPI, on the command line.
    ``track_dirty``: differences are to be saved of the machine. ``ring_bytes``: of the dirty ring of each of its vCPUs
    on KVM, 0 for none; None leaves it to what pays.
    """

    name: str
    memory_mib: int
    vcpus: int
    kernel: Path
    initrd: Path | None
    appended: bytes = b""
    cmdline: str = ""
    tsc_khz: int | None = None
    acpi: bool = True
    devices: DeviceConfig = attrs.field(factory=DeviceConfig)
    resources: Resources = attrs.field(factory=Resources)
    track_dirty: bool = False
    ring_bytes: int | None = None


@attrs.frozen
class Evidence:
    """Where a guest stands: the newest exit's name and vCPU 0's RIP, None where the backend cannot tell."""

    last_exit: str | None = None
    rip: int | None = None


class Machine(Protocol):
    """One guest's hardware, from power-on to the last freed resource."""

    accel: AccelName

    @property
    def balloon(self) -> BalloonBackend | None:
        """The balloon, from the start on; None without one."""

    @property
    def ports(self) -> Mapping[str, ByteStream]:
        """The virtio console's ports by name, from the start on; ``console`` is hvc0."""

    @property
    def vsock(self) -> VsockHost | None:
        """The host's end of the guest's sockets, from the start on; None without a vsock device."""

    async def prepare(self) -> None:
        """Check and read what the guest is to be made of; nothing is started. Cancelled or failed, it leaves nothing.

        Raises ConfigError (the plan does not fit) or HostError.
        """

    async def start(self) -> None:
        """Create everything and let the guest run; prepares first, if that was not done. Cancelled or failed, it
        leaves nothing behind.

        Raises ConfigError (the plan does not fit), HostError or MachineError.
        """

    async def write(self, port: Port, data: bytes) -> None:
        """Send bytes to the guest's serial port; returns when the port has taken them all."""

    async def pause(self) -> None:
        """Stop every vCPU; returns when none runs guest code."""

    async def resume(self) -> None:
        """Let the vCPUs run on."""

    async def expect_save(self) -> None:
        """Get ready for ``save``, so that nothing is left to do then but to save. Raises StateError, HostError."""

    async def precopy(self, memory: MemoryWriter) -> None:
        """Copy memory to a file while the guest runs, until what it dirties meanwhile is little: ``save`` copies only
        that then. Cancelled, it leaves nothing behind but what is in the file.

        Raises StateError, SnapshotFailed.
        """

    async def save(self, memory: MemoryWriter, *, difference_of: str | None = None) -> SavedMachine:
        """The state of a paused machine, which stays paused and unharmed; its memory goes to ``memory``.

        ``difference_of``: the ``saved_as`` whose difference is enough; None for all of memory. Raises StateError,
        SnapshotFailed (no room; a difference that cannot be had), MachineError.
        """

    def saved_as(self, name: str) -> None:
        """What was saved last is on disk, whole, under that name: differences from here on are differences of it."""

    async def restore(self, plan: RestorePlan) -> None:
        """Instead of ``start``: become the machine that was saved, its vCPUs held as by ``pause``. Cancelled or failed,
        it leaves nothing behind.

        Raises SnapshotMismatch, SnapshotDamaged, HostError or MachineError.
        """

    async def request_shutdown(self) -> None:
        """Press the guest's power button. Whether it listens is the guest's affair."""

    async def stop(self) -> None:
        """End the guest and free everything: threads, mappings, descriptors, children. May be called again."""

    def exits(self) -> ExitStatistics | None:
        """Exits to userspace so far; None where the backend cannot tell."""

    async def evidence(self) -> Evidence:
        """What can be said about a guest that does not become ready. May pause it; never raises."""

    def guest_instant(self, tsc: int) -> tuple[int, int] | None:
        """When the guest's time stamp counter was ``tsc``: CLOCK_MONOTONIC ns, and the most that may be wrong with it.

        None where the backend cannot tell, or if that was before the guest started or is still to come.
        """

    def guest_time(self) -> GuestTime | None:
        """The guest's time stamp counter now, beside the host's time; None where the backend cannot tell."""

    def progress(self) -> int:
        """A number that grows while the guest shows life (exits taken, serial bytes written)."""

    def activity(self) -> int:
        """As ``progress``, but for the console and what PID 1 does on the control line by itself."""

    def watch_port(self, port: int, value: int | None, told: Callable[[int], None]) -> Callable[[], None]:
        """Have ``told`` called once, on the loop, with the next byte that the guest writes to an I/O port at which no
        device is: ``value``, or any for None. Returns what ends that.

        Raises ConfigError for a port that cannot be watched, StateError before the start.
        """
