"""One table of what a boot's profiles must have on each machine, field by field, and the check of a real boot by it.

The names and what they mean are an interface. A field that applies must not be None, and its nanoseconds not 0, unless
the table says that they may; a field that does not apply is None, and the table says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import anyio
import attrs

from asyncvmm import VM, VmTiming
from asyncvmm.events.types import GuestBootTime
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.profiles import CreateVmProfile, GuestBootProfile, VcpuSetupProfile

Machine = Literal["kvm", "qemu"]
STAGES = ("init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop")
"""What our init reports. A guest of other people's making may report less."""


@attrs.frozen
class Applies:
    """The field has a value. ``zero``: which may be 0. ``wanted``: which must be this one."""

    zero: bool = False
    wanted: int | None = None


@attrs.frozen
class Absent:
    """The field is None, and why."""

    reason: str


Rule = Applies | Absent


@attrs.frozen
class Row:
    """A field's rule on each machine."""

    kvm: Rule
    qemu: Rule

    def on(self, machine: Machine) -> Rule:
        """That of one."""
        return self.kvm if machine == "kvm" else self.qemu


def both(rule: Rule) -> Row:
    """The same on each."""
    return Row(rule, rule)


SOME = Applies()
ANY = Applies(zero=True)
ZERO = Applies(zero=True, wanted=0)
BY_QEMU = Row(SOME, Absent("QEMU does it, out of our sight"))
OF_QEMU = Row(Absent("there is no QEMU on KVM"), ANY)

TABLE: Mapping[str, Mapping[str, Row]] = {
    "VmTiming": {  # whole milliseconds
        "setup_ms": both(ANY),
        "boot_ms": both(ANY),
        "overlay_ms": both(Absent("a boot from an initrd has no overlay")),
        "qemu_cmd_build_ms": OF_QEMU,
        "gvproxy_start_ms": both(ZERO),  # 0 is what stands for: no network
        "qemu_fork_ms": OF_QEMU,
        "guest_wait_ms": both(ANY),
        "boot_retries": both(ZERO),
        "total_ms": both(ANY),
    },
    "GuestBootProfile": {f"{stage}_ns": both(SOME) for stage in STAGES},
    "BootProfile": {
        "t_total_start": both(SOME),
        "t_kvm_open": BY_QEMU,
        "t_vm_create": BY_QEMU,
        "t_memory_setup": BY_QEMU,
        "t_kernel_load": BY_QEMU,
        "t_rootfs_load": BY_QEMU,
        "t_vcpu_setup": BY_QEMU,
        "t_boot_start": both(SOME),
        "t_boot_ready": both(SOME),
        "t_total_end": both(SOME),
        "memory_alloc_duration": BY_QEMU,
        "memory_register_duration": BY_QEMU,
        "kernel_load_duration": BY_QEMU,
        "rootfs_load_duration": BY_QEMU,
        "vcpu_create_duration": BY_QEMU,
        "vcpu_config_duration": BY_QEMU,
        "boot_params_duration": BY_QEMU,
        "guest": both(SOME),
        "host_logged": both(ANY),
        "guest_extension_logged": both(ANY),
        "capture_guest_boot_lines": both(ANY),
        "total": both(SOME),
        "kvm_open": BY_QEMU,
        "vm_create": BY_QEMU,
        "memory": BY_QEMU,
        "kernel_load": BY_QEMU,
        "rootfs_load": BY_QEMU,
        "boot_params": BY_QEMU,
        "vcpu_setup": BY_QEMU,
        "boot_wait": both(SOME),
        "host_misc": both(ANY),  # a remainder
    },
    "CreateVmProfile": {
        "kvm_fd_open": BY_QEMU,
        "kvm_create_vm": BY_QEMU,
        "vm_arch_setup": BY_QEMU,
        "guest_memory_mmap": BY_QEMU,
        "kernel_asset_read": BY_QEMU,
        "rootfs_asset_read": BY_QEMU,
        "kernel_elf_load": BY_QEMU,
        "rootfs_write": BY_QEMU,
        "kvm_set_user_memory_region": BY_QEMU,
        "vcpu_creation": BY_QEMU,
        "vcpu_register_config": BY_QEMU,
        "cpuid_config": BY_QEMU,
        "boot_params": BY_QEMU,
        "create_vm_total": both(SOME),
        "boot_wait": both(SOME),
        "profiled_create_vm_total": BY_QEMU,
        "create_vm_misc": both(ANY),  # a remainder
        "cold_start_total": both(SOME),
    },
    "VcpuSetupProfile": {"cpuid_config": BY_QEMU, "register_config": BY_QEMU},
}

MEASURED: Mapping[str, str] = {"overlay_ms": "overlay", "gvproxy_start_ms": "network_helper"}
"""Fields of VmTiming that say otherwise where the boot makes an overlay, or starts a network helper: how long the phase
of that name took."""


Record = VmTiming | GuestBootProfile | BootProfile | CreateVmProfile | VcpuSetupProfile


def records(vm: VM) -> dict[str, Record]:
    """The profiles of a VM that has booted, by name."""
    assert vm.timing is not None
    return {
        "VmTiming": vm.timing,
        "GuestBootProfile": vm.guest_profile,
        "BootProfile": vm.boot_profile,
        "CreateVmProfile": vm.create_vm_profile,
        "VcpuSetupProfile": vm.vcpu_setup_profile or VcpuSetupProfile(),
    }


def values(record: Record) -> dict[str, object]:
    """A profile's fields and derived totals by name."""
    totals = {"total_ms": record.total_ms} if isinstance(record, VmTiming) else record.totals()
    return {field.name: getattr(record, field.name) for field in attrs.fields(type(record))} | totals


async def boot_whole(vm: VM, stages: Sequence[str] = STAGES) -> None:
    """Boot, and wait for the last of the guest's stages, which may come after READY."""
    async with vm.events.subscribe(types=[GuestBootTime]) as times:
        await vm.boot()
        with anyio.fail_after(60):
            while getattr(vm.guest_profile, f"{stages[-1]}_ns") is None:
                await anext(times)


def check(vm: VM, machine: Machine, stages: Sequence[str] = STAGES) -> None:
    """Hold all profiles of a VM that ``boot_whole`` has booted, with an initrd, against the table."""
    assert vm.accel == machine
    complaints = list(complaints_about(vm, machine, stages))
    assert not complaints, "\n".join(complaints)


def complaints_about(vm: VM, machine: Machine, stages: Sequence[str] = STAGES) -> Iterator[str]:
    """One line for each field that is not as the table says."""
    unsaid = {f"{stage}_ns" for stage in STAGES if stage not in stages}
    for kind, record in records(vm).items():
        for name, value in values(record).items():
            rule = TABLE[kind][name].on(machine)
            if kind == "VmTiming" and name in MEASURED:
                rule = _measured(vm, name) or rule
            if kind == "GuestBootProfile" and name in unsaid:
                rule = Absent("this guest does not say so")
            if wrong := objection(rule, value):
                yield f"{kind}.{name} on {machine}: {wrong}"


def _measured(vm: VM, name: str) -> Rule | None:
    """What a field must be by its phase; None where nothing was asked for that takes one."""
    net, phase = vm.config.net, MEASURED[name]
    asked = {
        "overlay": any(drive.overlay for drive in vm.config.drives),
        "network_helper": net is not None and net.mode == "user",
    }
    if not asked[phase]:
        return None
    (spent_ns,) = (found.duration_ns for found in vm.timeline.phases if found.name == phase)
    assert spent_ns > 0
    return Applies(zero=True, wanted=spent_ns // 1_000_000)


def objection(rule: Rule, value: object) -> str | None:
    """What is wrong with a value; None if nothing is."""
    if isinstance(rule, Absent):
        return None if value is None else f"expected None ({rule.reason}), found {value!r}"
    if value is None:
        return "not recorded"
    if rule.wanted is not None and value != rule.wanted:
        return f"expected {rule.wanted}, found {value!r}"
    if isinstance(value, int) and (value < 0 or (value == 0 and not rule.zero)):
        return f"cannot be {value}"
    return None
