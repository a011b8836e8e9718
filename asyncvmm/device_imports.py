"""Imports what a VM's devices take, on a worker thread: later it would be the event loop that waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Final

from asyncvmm.device_list import DeviceConfig
from asyncvmm.machine.base import AccelName

_ON_BOTH: Final = {
    "drives": ("storage.overlay",),
    "net": ("net.user", "net.tap"),
    "balloon": ("balloon",),
    "vsock": ("devices.virtio.vsock.device", "vsock.host", "vsock.uds", "vsock.of_vm"),
}
_ON_KVM: Final = {
    "drives": ("devices.virtio.blk", "storage.drive", "storage.disk"),
    "net": ("devices.virtio.net", "net.stream", "net.tap_link"),
    "balloon": ("devices.virtio.balloon.device", "machine.kvm.discard"),
    "rng": ("devices.virtio.rng",),
    "console": ("devices.virtio.console.device", "streams.port"),
}


def import_devices(devices: DeviceConfig, accel: AccelName) -> None:
    """Import all that these devices need on that machine."""
    if devices.count:
        for module in ("resources", *_modules(devices, accel)):
            import_module(f"asyncvmm.{module}")


def _modules(devices: DeviceConfig, accel: AccelName) -> Iterator[str]:
    for homes in (_ON_BOTH, _ON_KVM) if accel == "kvm" else (_ON_BOTH,):
        for device, modules in homes.items():
            if getattr(devices, device):
                yield from modules
