"""The virtio devices of one KVM machine: made from the plan, put into their places, joined to what they stand on.

In three steps, for a file may take its time to open and a VM to be created: ``open`` before there is a VM, ``fit`` on
the loop once there is one, ``attach`` on a worker thread before its vCPUs start.

While the machine stands still so do they, from ``hold`` to ``unhold``: no guest memory is touched, no interrupt raised.
What comes from outside meanwhile waits where it is, kicks in their eventfds. Then every queue is looked at once, so no
kick is lost, not even one that a snapshot fell upon.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio

from asyncvmm.bus import Bus
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.errors import ImageError, SnapshotDamaged, SnapshotFailed
from asyncvmm.machine.base import BootPlan, DriveResource
from asyncvmm.machine.kvm.device_states import restore_states, states_of
from asyncvmm.machine.kvm.virtio import VirtioSlot, fence_of, registers_of
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.metrics.vm_metrics import VmMetrics

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from asyncvmm.balloon import BalloonBackend
    from asyncvmm.net.link import Link
    from asyncvmm.storage.disk import Disk
    from asyncvmm.storage.drive import BlkShell
    from asyncvmm.vsock.host import VsockHost

HOLD_TIMEOUT_S: Final = 5.0
"""How long requests under way on a disk are waited for. One that hangs longer keeps no VM from being paused, but it
cannot be saved then."""

_log = logging.getLogger("asyncvmm.devices")

Fail = Callable[[Exception], None]


class DeviceSet:
    """All virtio devices of the VM of ``plan``, counting in ``metrics``. ``balloon``, ``ports`` and ``vsock`` are there
    once they are fitted."""

    def __init__(self, plan: BootPlan, metrics: VmMetrics) -> None:
        self.slots: list[VirtioSlot] = []
        self.balloon: BalloonBackend | None = None
        self.ports: Mapping[str, ByteStream] = {}
        self.vsock: VsockHost | None = None
        self._plan = plan
        self._metrics = metrics
        self._disks: list[Disk] = []
        self._drives: list[BlkShell] = []
        self._guest_ended: list[Callable[[], None]] = []
        self._closing: list[Callable[[], Awaitable[object]]] = []
        self._at_close: list[Callable[[], None]] = []
        self._view = GuestView(())
        self._has_ended = False
        self._held = self._is_new_guest = False
        self._is_drained = True

    @property
    def asked(self) -> DeviceConfig:
        """What was asked for."""
        return self._plan.devices

    async def open(self) -> None:
        """Open the drives. Raises ConfigError and HostError, with their kinds, and SnapshotDamaged for a snapshot's
        overlay that is none; ``aclose`` frees what is open."""
        for drive in self._plan.resources.drives:
            self._disks.append(await _open(drive))

    # -- on the loop, with a VM that does not run yet ------------------------------------------------------------------

    def fit(self, vm: KvmVm, fail: Fail, state: bytes | None = None) -> None:
        """Make the devices, each at its place. ``fail`` hears of an error of ours. ``state``: the section
        ``devices`` of the snapshot that the VM is restored from; they are held then.

        Raises ConfigError, HostError, SnapshotDamaged, SnapshotMismatch.
        """
        self._held = self._is_new_guest = state is not None
        memory = vm.memory
        self._view = GuestView(memory.views(), memory.mark, fence=fence_of(threading.Lock()), dirty=memory.host_writes)
        self._fit(vm, fail)
        if state is not None:
            restore_states(self.slots, state)

    def _fit(self, vm: KvmVm, fail: Fail) -> None:
        loop = asyncio.get_running_loop()
        self._fit_drives(vm, loop, fail)
        if self.asked.net is not None:
            self._fit_net(vm, loop, fail)
        if self.asked.rng is not None:
            self._fit_rng(vm, loop, fail)
        if self.asked.console is not None:
            self._fit_console(vm, loop, fail)
        if self.asked.vsock is not None:
            self._fit_vsock(vm, loop, fail)
        if self.asked.balloon is not None:
            self._fit_balloon(vm, loop, fail)

    def _place(
        self, vm: KvmVm, name: str, device: VirtioDevice, loop: asyncio.AbstractEventLoop, fail: Fail
    ) -> VirtioSlot:
        index = len(self.slots)
        slot = VirtioSlot(index, device, self._view, registers_of(vm.registers, index), name, vm=self._plan.name)
        if self._held:
            slot.hold()
        self.slots.append(slot)
        slot.watch(loop, fail)
        return slot

    def _fit_drives(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        if not self._disks:
            return
        from asyncvmm.devices.virtio.blk import VirtioBlk
        from asyncvmm.storage.drive import BlkShell

        for resource, disk in zip(self._plan.resources.drives, list(self._disks), strict=True):
            config = resource.config
            name = config.id or "drive"
            device = VirtioBlk(
                disk.size,
                self._metrics.block(name),
                serial=name,
                read_only=config.read_only,
                discard=config.discard,
            )
            self._place(vm, f"blk-{name}", device, loop, fail)
            self._drives.append(BlkShell(device, disk, loop))

    def _fit_rng(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        from asyncvmm.devices.virtio.rng import VirtioRng

        assert self.asked.rng is not None
        device = VirtioRng(
            self.asked.rng,
            lambda size: os.getrandom(size, os.GRND_NONBLOCK),
            self._metrics.entropy,
            clock_ns=time.monotonic_ns,
            later=loop.call_later,
        )
        self._place(vm, "rng", device, loop, fail)

    def _fit_vsock(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        from asyncvmm.devices.virtio.vsock.device import VirtioVsock
        from asyncvmm.vsock.host import VsockHost
        from asyncvmm.vsock.uds import UnixSockets

        assert self.asked.vsock is not None
        device = VirtioVsock(self.asked.vsock.cid, self._metrics.vsock)
        self._place(vm, "vsock", device, loop, fail)
        host = self.vsock = VsockHost(device)
        self._guest_ended.append(host.close)
        if self.asked.vsock.uds_path is not None:
            sockets = UnixSockets(host, self.asked.vsock.uds_path, self._metrics.vsock)
            self._closing.append(sockets.aclose)
            sockets.start()

    def _fit_balloon(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        from asyncvmm.balloon import DeviceBalloon
        from asyncvmm.devices.virtio.balloon.device import VirtioBalloon
        from asyncvmm.machine.kvm.discard import GuestDiscard

        assert self.asked.balloon is not None
        memory = vm.memory
        discard = GuestDiscard(memory.regions, memory.host_address, memory.backing, on_discard=memory.mark)
        device = VirtioBalloon(self.asked.balloon, self._view.ranges, discard, self._metrics.balloon)
        self._place(vm, "balloon", device, loop, fail)
        self.balloon = DeviceBalloon(device)

    def _fit_net(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        from asyncvmm.devices.virtio.net import VirtioNet
        from asyncvmm.net.addresses import MTU
        from asyncvmm.net.mac import parse_mac
        from asyncvmm.net.stream import StreamLink
        from asyncvmm.net.tap_link import TapLink

        net, resources = self.asked.net, self._plan.resources
        assert net is not None
        assert resources.net_fd is not None
        assert resources.mac is not None
        is_tap = net.mode == "tap"
        link: Link = (TapLink if is_tap else StreamLink)(loop, resources.net_fd, on_down=self._net_down, fail=fail)
        self._at_close.append(link.close)
        mtu = None if is_tap else MTU
        device = VirtioNet(parse_mac(resources.mac), link, self._metrics.net("eth0"), mtu=mtu, offloads=is_tap)
        link.attach(device)
        self._place(vm, "net-eth0", device, loop, fail)

    def _net_down(self, error: Exception) -> None:
        _log.warning("the network of %s is down: %s", self._plan.name, error)

    def _fit_console(self, vm: KvmVm, loop: asyncio.AbstractEventLoop, fail: Fail) -> None:
        from asyncvmm.devices.virtio.console.device import VirtioConsole
        from asyncvmm.streams.port import PortStream

        assert self.asked.console is not None
        device = VirtioConsole(self.asked.console, self._metrics.console)
        self._place(vm, "console", device, loop, fail)
        ports = {port.name: PortStream(device, port) for port in device.ports}
        self._guest_ended += [port.end for port in ports.values()]
        self.ports = ports

    # -- on a worker thread --------------------------------------------------------------------------------------------

    def attach(self, vm: KvmVm, bus: Bus) -> None:
        """Put the registers on the bus, give KVM lines and kicks. Raises KvmIoctlError."""
        for slot in self.slots:
            bus.attach_mmio(slot.name, slot.place.address, slot.place.size, slot.transport, slot.lock)
            slot.attach(vm.fd)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    async def hold(self) -> None:
        """Stand still; no vCPU may run. Requests under way on disks are finished first, if that takes no longer than
        HOLD_TIMEOUT_S. Cancelled, the devices work on. May be called again."""
        if self._held:
            return
        self._held = True
        for slot in self.slots:
            slot.stop()
        try:
            await self._drain()
        except BaseException:
            self.unhold()
            raise
        if self._held:
            for slot in self.slots:
                slot.hold()
            for drive in self._drives:
                drive.hold()

    async def _drain(self) -> None:
        self._is_drained = False
        with anyio.move_on_after(HOLD_TIMEOUT_S):
            for drive in self._drives:
                await drive.drained()
            self._is_drained = True

    def unhold(self) -> None:
        """Work on, as before a guest that runs again. May be called again."""
        if self._held:
            self._let_go()
            for slot in self.slots:
                slot.go_on(interrupt=self._is_new_guest)
            self._is_new_guest = False

    def _let_go(self) -> None:
        self._held = False
        for slot in self.slots:
            slot.release()
        for drive in self._drives:
            drive.release()

    def guest_ended(self) -> None:
        """Serve its last kicks; then whoever waits for it at a device learns that it will not come."""
        if self._has_ended:
            return
        self._has_ended = True
        if not self._is_new_guest:
            self._let_go()
            for slot in self.slots:
                slot.work_off()
        while self._guest_ended:
            self._guest_ended.pop()()

    async def state(self) -> dict[str, Any]:
        """What a snapshot keeps of each device, by name: plain values, the section's when encoded. No vCPU may run; the
        devices are held afterwards. Raises SnapshotFailed: a disk hangs, or its overlay cannot be written.
        """
        await self.hold()
        if not self._is_drained:
            raise SnapshotFailed("saving devices", expected="idle disks", found=f"requests of {HOLD_TIMEOUT_S:g} s")
        for drive in self._drives:
            await _settle(drive.disk)
        return states_of(self.slots)

    async def aclose(self) -> bool:
        """Finish what is under way and let go of everything; no vCPU thread may run any more.

        False: a disk hangs, and guest memory must stay mapped, for its thread may still read there.
        """
        self.guest_ended()
        while self._closing:
            await self._closing.pop()()
        drives, disks = self._drives, self._disks[len(self._drives) :]
        self._drives, self._disks = [], []
        # All at once: each may take as long as a disk that hangs is given.
        done = await asyncio.gather(*(drive.aclose() for drive in drives), *(disk.aclose() for disk in disks))
        while self._at_close:
            self._at_close.pop()()
        for slot in self.slots:
            slot.close()
        self.slots = []
        self._view.close()
        if not all(done):
            _log.error("a disk of %s hangs: the guest's memory is not freed", self._plan.name)
        return all(done)


async def _open(drive: DriveResource) -> Disk:
    from asyncvmm.storage.disk import open_disk

    try:
        return await open_disk(drive.config, drive.overlay)
    except ImageError as error:
        if drive.overlay is None or drive.overlay.how != "saved":
            raise
        raise SnapshotDamaged(f"drive {drive.config.id}", expected=error.expected, found=error.found) from None


async def _settle(disk: Disk) -> None:
    try:
        await disk.settle()
    except OSError as error:
        raise SnapshotFailed(f"saving drive {disk.name}", expected="room for it", found=error.strerror) from None
