"""The profiles of a boot attempt, from its phases: there is no second set of clocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.profiles import (
    CreateVmProfile,
    GuestBootProfile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
    total_of,
)
from asyncvmm.timing.timeline import Phase

_CREATION = ("kernel_asset_read", "rootfs_asset_open", "layout", "qemu_cmd_build")
"""What belongs to creating the VM and is done before its ``boot`` begins, so that nothing is started in vain."""

_MADE_BY_QEMU = ("qemu_cmd_build", "qemu_fork", "qemu_qmp_connect")
"""Until QEMU answers, its machine made: all that a KVM machine does in steps of its own, but memory and state."""


class _Attempt:
    """An attempt's phases by name."""

    def __init__(self, phases: Iterable[Phase]) -> None:
        self._phases: dict[str, Phase] = {}
        self._took: dict[str, int] = {}
        for phase in phases:
            self._phases[phase.name] = phase
            self._took[phase.name] = self._took.get(phase.name, 0) + phase.duration_ns

    def took(self, *names: str) -> int | None:
        """All of them together, each as often as it was."""
        return total_of(*(self._took[name] for name in names if name in self._took))

    def start(self, name: str, zero_ns: int = 0) -> int | None:
        return self._phases[name].start_ns - zero_ns if name in self._phases else None

    def end(self, name: str, zero_ns: int = 0) -> int | None:
        """When it was done: a phase that failed has taken its time, but nothing is done."""
        phase = self._phases.get(name)
        return None if phase is None or phase.failed else phase.end_ns - zero_ns


def boot_profile(phases: Sequence[Phase], start_ns: int, guest: GuestBootProfile) -> BootProfile:
    """The BootProfile of one attempt, whose VM started at ``start_ns`` (CLOCK_MONOTONIC)."""
    attempt = _Attempt(phases)
    profile = BootProfile(
        t_total_start=attempt.start("boot", start_ns),
        t_kvm_open=attempt.end("kvm_open", start_ns),
        t_vm_create=attempt.end("vm_create", start_ns),
        t_memory_setup=attempt.end("memory", start_ns),
        t_kernel_load=attempt.end("kernel_load", start_ns),
        t_rootfs_load=attempt.end("rootfs_load", start_ns),
        t_vcpu_setup=attempt.end("vcpu_config", start_ns),
        t_boot_start=attempt.start("boot_wait", start_ns),
        memory_alloc_duration=attempt.took("memory_alloc"),
        memory_register_duration=attempt.took("memory_register"),
        kernel_load_duration=attempt.took("kernel_load"),
        rootfs_load_duration=attempt.took("rootfs_load"),
        vcpu_create_duration=attempt.took("vcpu_create"),
        vcpu_config_duration=attempt.took("vcpu_config"),
        boot_params_duration=attempt.took("boot_params"),
        guest=guest,
        capture_guest_boot_lines=guest.command_loop_ns is None,
    )
    ready = attempt.end("boot_wait", start_ns)
    if ready is not None:
        profile.mark_boot_ready(ready)
    return profile


def create_vm_profile(phases: Sequence[Phase]) -> CreateVmProfile:
    """The CreateVmProfile of one attempt. On QEMU, which does it out of our sight, only the totals are known."""
    attempt = _Attempt(phases)
    return CreateVmProfile(
        kvm_fd_open=attempt.took("kvm_open"),
        kvm_create_vm=attempt.took("kvm_create_vm"),
        vm_arch_setup=attempt.took("vm_arch_setup", "irqchip_create"),
        guest_memory_mmap=attempt.took("memory_alloc"),
        kernel_asset_read=attempt.took("kernel_asset_read"),
        rootfs_asset_read=attempt.took("rootfs_asset_open"),
        kernel_elf_load=attempt.took("kernel_load"),
        rootfs_write=attempt.took("rootfs_load"),
        kvm_set_user_memory_region=attempt.took("memory_register"),
        vcpu_creation=attempt.took("vcpu_create"),
        vcpu_register_config=attempt.took("register_config"),
        cpuid_config=attempt.took("cpuid_config"),
        boot_params=attempt.took("layout", "boot_params"),
        create_vm_total=_creation(attempt),
        boot_wait=attempt.took("boot_wait"),
    )


def _creation(attempt: _Attempt) -> int | None:
    """From the boot's begin until the wait for the guest, and what was done for it before; vCPU configuration apart."""
    begin, end = attempt.start("boot"), attempt.start("boot_wait")
    if begin is None or end is None:
        return None
    return end - begin + (attempt.took(*_CREATION) or 0) - (attempt.took("vcpu_config") or 0)


def restore_profile(phases: Sequence[Phase]) -> RestoreProfile:
    """The RestoreProfile of a VM made of a snapshot. On QEMU it has fewer parts, which add up to the whole as well."""
    attempt = _Attempt(phases)
    return RestoreProfile(
        kvm_fd_open=attempt.took("kvm_open"),
        kvm_create_vm=attempt.took("kvm_create_vm"),
        vm_arch_setup=attempt.took("vm_arch_setup", "irqchip_create", *_MADE_BY_QEMU),
        guest_memory_mmap=attempt.took("memory_alloc"),
        kvm_set_user_memory_region=attempt.took("memory_register"),
        vcpu_creation=attempt.took("vcpu_create"),
        cpuid_config=attempt.took("cpuid_config"),
        memory_state_write=attempt.took("memory_state_write"),
        vcpu_state_restore=attempt.took("vcpu_state_restore"),
        device_state_restore=attempt.took("device_state_restore"),
        resume_kvm_run=attempt.took("resume_kvm_run"),
        restore_total=attempt.took("total"),
    )


def runtime_restore_profile(phases: Sequence[Phase]) -> RuntimeRestoreProfile:
    """The RuntimeRestoreProfile of a VM made of a snapshot in a shell."""
    attempt = _Attempt(phases)
    return RuntimeRestoreProfile(
        vcpu_state_restore=attempt.took("vcpu_state_restore"),
        device_state_restore=attempt.took("device_state_restore"),
        restore_total=attempt.took("total"),
    )


def vcpu_setup_profile(phases: Sequence[Phase]) -> VcpuSetupProfile | None:
    """The VcpuSetupProfile of one attempt; None where the vCPUs are not ours to set up."""
    attempt = _Attempt(phases)
    profile = VcpuSetupProfile(
        cpuid_config=attempt.took("cpuid_config"), register_config=attempt.took("register_config")
    )
    return profile if profile.to_dict() else None
