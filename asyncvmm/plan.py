"""From what was asked for to what to boot: image files, command line, devices, the workload's archive. Blocking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from asyncvmm.config import VMConfig, check_cmdline
from asyncvmm.errors import ConfigError
from asyncvmm.guest.archive import GuestNet, RootMount, workload_archive
from asyncvmm.guest.cmdline import default_cmdline
from asyncvmm.guest.store import Image, find_image
from asyncvmm.machine.base import AccelName, BootPlan

if TYPE_CHECKING:
    from asyncvmm.device_config import DeviceConfig, DriveConfig


def make_plan(config: VMConfig, name: str, accel: AccelName, tsc_khz: int | None) -> BootPlan:
    """Decide what to boot. Reads the image's manifest. Raises ConfigError and its kinds."""
    if accel == "qemu" and not config.acpi:
        raise ConfigError("acpi", expected="the KVM machine, or a kernel with ACPI", found="the QEMU machine")
    if config.kernel is None and config.initrd is not None:
        raise ConfigError("initrd", expected="a kernel beside it", found="none")
    kernel, initrd, image = config.kernel, config.initrd, None
    if kernel is None:
        image = find_image(config.image)
        kernel, initrd = image.kernel, image.initrd
    if config.workload and initrd is None:
        raise ConfigError("workload", expected="an initrd with PID 1 in it", found="no initrd")
    cmdline = default_cmdline(accel) if config.cmdline is None else config.cmdline
    check_cmdline(cmdline)
    plan = BootPlan(
        name=name,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        kernel=kernel,
        initrd=initrd,
        appended=workload_archive(config.workload, config.env, arm_pre_exec=config.pre_exec_window),
        cmdline=cmdline,
        tsc_khz=tsc_khz,
        acpi=config.acpi,
        track_dirty=config.track_dirty,
    )
    plan = _with_devices(plan, config, image)
    if accel == "qemu":  # our own machine checks as it loads; QEMU would start, and fail in words of its own or hang
        from asyncvmm.machine.assets import check_bootable  # with it comes all of x86, which KVM's users get later

        check_bootable(plan)
    return plan


def _with_devices(plan: BootPlan, config: VMConfig, image: Image | None) -> BootPlan:
    """The plan with its virtio devices, and with what PID 1 is to make of them."""
    root = None if image is None else image.root
    if not config.has_devices and root is None:
        return plan
    devices = config.devices if root is None else _with_image_root(config.devices, root)
    archive = b""
    if plan.initrd is not None:
        ports = devices.console.ports if devices.console is not None else ()
        archive = workload_archive(
            config.workload,
            config.env,
            arm_pre_exec=config.pre_exec_window,
            root=_root(devices),
            net=_net(devices),
            ports=ports,
        )
    return attrs.evolve(plan, devices=devices, appended=archive)


def _with_image_root(devices: DeviceConfig, path: Path) -> DeviceConfig:
    """The image's root is the first drive, unless another one was asked for."""
    if any(drive.root for drive in devices.drives):
        return devices
    root = _image_root(path)
    if any(drive.id == root.id for drive in devices.drives):
        raise ConfigError("drive id", expected="another one than the image's root has", found=repr(root.id))
    return attrs.evolve(devices, drives=(root, *devices.drives))


def _image_root(path: Path) -> DriveConfig:
    """The image stays as it is: every VM of it writes to an overlay of its own."""
    from asyncvmm.device_config import DriveConfig

    if path.suffix in (".squashfs", ".erofs"):
        return DriveConfig(path=path, id="root", root=True, read_only=True)
    return DriveConfig(path=path, id="root", root=True, overlay=True)


def _root(devices: DeviceConfig) -> RootMount | None:
    for index, drive in enumerate(devices.drives):
        if drive.root:
            return RootMount(f"vd{chr(ord('a') + index)}", drive.root_type, drive.read_only)
    return None


def _net(devices: DeviceConfig) -> GuestNet | None:
    net = devices.net
    if net is None or net.address == "none":
        return None
    if net.address == "dhcp":
        return GuestNet("eth0")
    if net.mode == "tap":
        return GuestNet("eth0", net.address, net.gateway, net.dns)
    from asyncvmm.net.addresses import plan_addresses  # the helper's network, where some of it is ours to choose

    addresses = plan_addresses(net)
    return GuestNet("eth0", addresses.guest, addresses.gateway, addresses.dns)
