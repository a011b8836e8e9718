"""The virtio devices of one KVM machine: made from the plan, put into their places, joined to what they stand on.

In three steps, for a file may take its time to open and a VM to be created: ``open`` before there is a VM, ``fit`` on
the loop once there is one, ``attach`` on a worker thread before its vCPUs start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from asyncvmm.bus import Bus
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.machine.base import BootPlan
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

    @property
    def asked(self) -> DeviceConfig:
        """What was asked for."""
        return self._plan.devices

    async def open(self) -> None:
        """Open the drives. Raises ConfigError and HostError, with their kinds; ``aclose`` frees what is open."""
        from asyncvmm.storage.disk import open_disk

        for drive in self._plan.resources.drives:
            self._disks.append(await open_disk(drive.config, drive.overlay))

    # -- on the loop, with a VM that does not run yet ------------------------------------------------------------------

    def fit(self, vm: KvmVm, fail: Fail) -> None:
        """Make the devices, each at its place. ``fail`` hears of an error of ours. Raises ConfigError, HostError."""
        self._view = GuestView(vm.memory.views(), fence=fence_of(threading.Lock()))
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
        slot = VirtioSlot(index, device, self._view, registers_of(vm.registers, index), name)
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
        discard = GuestDiscard(vm.memory.regions, vm.memory.host_address, "anonymous")
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

    def guest_ended(self) -> None:
        """Serve its last kicks; then whoever waits for it at a device learns that it will not come."""
        if self._has_ended:
            return
        self._has_ended = True
        for slot in self.slots:
            slot.work_off()
        while self._guest_ended:
            self._guest_ended.pop()()

    async def state(self) -> dict[str, Any]:
        """What a snapshot keeps of each device, by name. The vCPUs must stand still; requests under way are finished
        first."""
        for drive in self._drives:
            await drive.drained()
        found = {}
        for slot in self.slots:
            with slot.lock:
                found[slot.name] = slot.transport.state()
        return found

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
