"""What a state that QEMU saved is good for: the same machine, the same QEMU, the same devices. Pure.

Neither microvm nor ``-cpu max`` is versioned, so only a QEMU of the same release is taken to read the state (patch
releases keep it). What a device stands on (image files, sockets, addresses) is not part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import attrs

from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import MachineType, QemuAccel, QemuBinary, choose_machine_type, transport_of
from asyncvmm.machine.qemu.devices import CONSOLE, DeviceEnds, DriveEnd, device_words
from asyncvmm.machine.saved import SavedMachine
from asyncvmm.snapshot import codec
from asyncvmm.snapshot.memory_map import MemoryMap, Run

STATE = "qemu"
"""The section with QEMU's state."""

SERIAL = "serial"
"""The section with what the serial lines' sockets held, if they held anything."""

MOST_INPUT = 1 << 16
"""More than one of them can hold."""

TSC_TOLERANCE_PPM = 250
"""As KVM's: beyond it the guest's clock would drift noticeably."""

_SHOWN = 300
_MAC = "mac"
_MAC_ADDRESS = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_GIB = 1 << 30
_Q35_MOST = 0xB0000000
_HOST_SIDE = re.compile(r",(?:mac|drive|chardev|netdev)=[^,]*")


def facts_of(plan: BootPlan, qemu: QemuBinary, accel: QemuAccel) -> dict[str, Any]:
    """What a machine must be to go on from the state of this one."""
    return {
        "machine": choose_machine_type(plan),
        "accelerator": accel,
        "qemu": ".".join(map(str, qemu.version[:2])),
        "vcpus": plan.vcpus,
        "memory_mib": plan.memory_mib,
        "tsc_khz": plan.tsc_khz,
        "host_cpu": qemu.host_cpu if accel == "kvm" else None,
        "devices": _devices(plan, qemu),
        _MAC: plan.resources.mac or (plan.devices.net and plan.devices.net.mac),
    }


def check_can_save(plan: BootPlan, difference_of: str | None) -> None:
    """Raises SnapshotFailed for what QEMU cannot save."""
    if difference_of is not None:
        raise SnapshotFailed("snapshot", expected="all of memory", found="a difference, which only KVM can tell")
    check_devices(plan.devices)


def check_devices(devices: DeviceConfig) -> None:
    """Raises SnapshotFailed for those that QEMU cannot save."""
    if devices.vsock is not None:
        raise SnapshotFailed("snapshot", expected="devices that QEMU can save", found="vsock, a vhost-user device")


def saved_machine(
    plan: BootPlan, facts: Mapping[str, Any], state: bytes, memory: MemoryMap, unread: Mapping[str, bytes] | None = None
) -> SavedMachine:
    """The record of a machine whose state QEMU saved. ``unread``: what waits outside of QEMU for the serial lines."""
    where = regions(plan.memory_mib, choose_machine_type(plan))
    sections = {STATE: state}
    if unread is not None and any(unread.values()):
        sections[SERIAL] = codec.encode(dict(unread))
    return SavedMachine(accel="qemu", vcpus=plan.vcpus, regions=where, sections=sections, cpu=facts, memory=memory)


def check(saved: SavedMachine, ours: Mapping[str, Any]) -> None:
    """Raises SnapshotMismatch for a state that such a machine cannot take, SnapshotDamaged for none."""
    if saved.accel != "qemu":
        raise SnapshotMismatch("snapshot", expected="one of the QEMU machine", found=f"one of {saved.accel}")
    for name, value in ours.items():
        if name != _MAC:
            _check(name, saved.cpu.get(name), value)
    if not saved.sections.get(STATE):
        raise SnapshotDamaged("QEMU's state", expected=f"a section {STATE}", found="none")


def saved_input(saved: SavedMachine) -> dict[str, bytes]:
    """What waited outside of QEMU for each serial line. Raises SnapshotDamaged."""
    section = saved.sections.get(SERIAL)
    found = {} if section is None else codec.decode(section)
    if not isinstance(found, dict) or not all(map(_is_input, found.values())):
        raise SnapshotDamaged("serial input", expected=f"at most {MOST_INPUT} bytes a line", found=str(found)[:_SHOWN])
    return found


def _is_input(value: object) -> bool:
    return isinstance(value, bytes) and len(value) <= MOST_INPUT


def with_saved_mac(plan: BootPlan, saved: SavedMachine) -> BootPlan:
    """The plan with the address that the guest's network card has. Raises SnapshotDamaged for what is none.

    QEMU takes it from the state, but announces the one on its command line to the network.
    """
    mac = saved.cpu.get(_MAC)
    if mac is None or plan.devices.net is None:
        return plan
    if not isinstance(mac, str) or not _MAC_ADDRESS.fullmatch(mac):
        raise SnapshotDamaged("saved MAC address", expected="six bytes", found=str(mac)[:_SHOWN])
    return attrs.evolve(plan, resources=attrs.evolve(plan.resources, mac=mac))


def _check(name: str, saved: object, ours: object) -> None:
    if name == "tsc_khz" and type(saved) is int and type(ours) is int:
        if abs(saved - ours) * 1_000_000 > TSC_TOLERANCE_PPM * saved:
            raise SnapshotMismatch("restored TSC", expected=f"{saved} kHz", found=f"{ours} kHz")
    elif saved != ours:
        raise SnapshotMismatch(f"restored {name}", expected=str(saved)[:_SHOWN], found=ours)


def regions(memory_mib: int, machine: MachineType) -> tuple[Run, ...]:
    """Where RAM lies, by hw/i386/microvm.c and hw/i386/pc_q35.c."""
    size = memory_mib << 20
    most = {"microvm": 3 * _GIB, "q35": 2 * _GIB if size >= _Q35_MOST else _Q35_MOST}[machine]
    return ((0, size),) if size <= most else ((0, most), (4 * _GIB, size - most))


def _devices(plan: BootPlan, qemu: QemuBinary) -> list[str]:
    """Their words on the command line, without what is the host's."""
    console = plan.devices.console
    names = () if console is None else (CONSOLE, *console.ports)
    ends = DeviceEnds(
        drives=tuple(DriveEnd(0) for _ in plan.resources.drives),
        ports=dict.fromkeys(names, 0),
        vsock=None if plan.devices.vsock is None else 0,
    )
    words = device_words(plan, transport_of(plan), qemu.version, ends)
    return [_HOST_SIDE.sub("", word) for option, word in pairwise(words) if option == "-device"]
