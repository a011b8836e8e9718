"""Profiles: what a boot or a restore is made of, as plain records with their derived totals.

All values are integer nanoseconds; None is what was not recorded, or does not apply to the machine. ``to_dict`` gives
names and values as they go into JSON lines, derived totals included, None left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs


def total_of(*durations: int | None) -> int | None:
    """The sum of what was recorded; None if nothing was."""
    recorded = [duration for duration in durations if duration is not None]
    return sum(recorded) if recorded else None


def left_of(total: int | None, parts: Iterable[int | None]) -> int | None:
    """What ``parts`` leave of ``total``, never below 0; None without a total."""
    return None if total is None else max(0, total - (total_of(*parts) or 0))


@attrs.define(kw_only=True)
class Profile:
    """What all profiles share."""

    def totals(self) -> dict[str, int | None]:
        """The derived totals by name."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived totals by name, those that are None left out."""
        values = {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}
        return {name: value for name, value in (values | self.totals()).items() if value is not None}


@attrs.frozen(kw_only=True)
class GuestBootProfile(Profile):
    """When PID 1 reached each stage: the guest's CLOCK_MONOTONIC in ns, None where it did not say."""

    init_entry_ns: int | None = None
    mounts_done_ns: int | None = None
    uart_access_done_ns: int | None = None
    init_ok_ns: int | None = None
    ready_ns: int | None = None
    command_loop_ns: int | None = None


@attrs.frozen(kw_only=True)
class CreateVmProfile(Profile):
    """From a configuration to a VM that can run, and the wait for its guest, by the step that spent the time.

    kernel_asset_read and rootfs_asset_read: getting at the files. kernel_elf_load and rootfs_write: putting them into
    guest memory. vm_arch_setup: interrupt controllers, timer and reserved addresses. boot_params: deciding and writing
    what the boot protocol wants (tables, zero page, command line). create_vm_total: all of that, the configuration of
    the vCPUs left out. boot_wait: from there to READY.
    """

    kvm_fd_open: int | None = None
    kvm_create_vm: int | None = None
    vm_arch_setup: int | None = None
    guest_memory_mmap: int | None = None
    kernel_asset_read: int | None = None
    rootfs_asset_read: int | None = None
    kernel_elf_load: int | None = None
    rootfs_write: int | None = None
    kvm_set_user_memory_region: int | None = None
    vcpu_creation: int | None = None
    vcpu_register_config: int | None = None
    cpuid_config: int | None = None
    boot_params: int | None = None
    create_vm_total: int | None = None
    boot_wait: int | None = None

    @property
    def profiled_create_vm_total(self) -> int | None:
        """The steps of creation that have a name."""
        return total_of(
            self.kvm_fd_open,
            self.kvm_create_vm,
            self.vm_arch_setup,
            self.guest_memory_mmap,
            self.kernel_asset_read,
            self.rootfs_asset_read,
            self.kernel_elf_load,
            self.rootfs_write,
            self.kvm_set_user_memory_region,
            self.vcpu_creation,
            self.boot_params,
        )

    @property
    def create_vm_misc(self) -> int | None:
        """What these leave of create_vm_total."""
        return left_of(self.create_vm_total, [self.profiled_create_vm_total])

    @property
    def cold_start_total(self) -> int | None:
        """From nothing to READY."""
        return total_of(self.create_vm_total, self.cpuid_config, self.vcpu_register_config, self.boot_wait)

    def totals(self) -> dict[str, int | None]:
        """profiled_create_vm_total, create_vm_misc, cold_start_total."""
        return {
            "profiled_create_vm_total": self.profiled_create_vm_total,
            "create_vm_misc": self.create_vm_misc,
            "cold_start_total": self.cold_start_total,
        }


@attrs.frozen(kw_only=True)
class VcpuSetupProfile(Profile):
    """Giving the vCPUs their CPUID, and their first registers."""

    cpuid_config: int | None = None
    register_config: int | None = None


@attrs.frozen(kw_only=True)
class RestoreProfile(Profile):
    """From a snapshot to a VM that can run.

    guest_memory_mmap: reserving the address range. memory_state_write: making the saved pages visible in it, by
    mapping the file and any prefetch, or by copying. resume_kvm_run: until the first KVM_RUN, if it was resumed.
    kvm_fd_open, guest_memory_mmap and memory_state_write lack what was done before the call, after the snapshot's last
    restore: they may be 0. restore_total: from the call until memory and state are in place.

    QEMU makes its machine out of our sight: vm_arch_setup is all of that, from looking for QEMU until it answers;
    device_state_restore is its reading of the state, the vCPUs' too; resume_kvm_run: until it has let the vCPUs run.
    """

    kvm_fd_open: int | None = None
    kvm_create_vm: int | None = None
    vm_arch_setup: int | None = None
    guest_memory_mmap: int | None = None
    kvm_set_user_memory_region: int | None = None
    vcpu_creation: int | None = None
    cpuid_config: int | None = None
    memory_state_write: int | None = None
    vcpu_state_restore: int | None = None
    device_state_restore: int | None = None
    resume_kvm_run: int | None = None
    restore_total: int | None = None

    @property
    def total_without_resume(self) -> int | None:
        """All but resume_kvm_run."""
        return total_of(
            self.kvm_fd_open,
            self.kvm_create_vm,
            self.vm_arch_setup,
            self.guest_memory_mmap,
            self.kvm_set_user_memory_region,
            self.vcpu_creation,
            self.cpuid_config,
            self.memory_state_write,
            self.vcpu_state_restore,
            self.device_state_restore,
        )

    @property
    def total_with_resume(self) -> int | None:
        """All of it."""
        return total_of(self.total_without_resume, self.resume_kvm_run)

    @property
    def restore_misc(self) -> int | None:
        """What the steps but resume_kvm_run leave of restore_total, never below 0: opening the snapshot, imports."""
        return left_of(self.restore_total, [self.total_without_resume])

    def totals(self) -> dict[str, int | None]:
        """total_without_resume, total_with_resume, restore_misc."""
        return {
            "total_without_resume": self.total_without_resume,
            "total_with_resume": self.total_with_resume,
            "restore_misc": self.restore_misc,
        }


@attrs.frozen(kw_only=True)
class RuntimeRestoreProfile(Profile):
    """Restoring a snapshot into a shell of a VM that was made ahead.

    restore_total: from the call until memory and state are in place.
    """

    vcpu_state_restore: int | None = None
    device_state_restore: int | None = None
    restore_total: int | None = None

    @property
    def restore_misc(self) -> int | None:
        """What the two leave of restore_total, never below 0: opening the snapshot, imports, the memory's pages."""
        return left_of(self.restore_total, [self.vcpu_state_restore, self.device_state_restore])

    def totals(self) -> dict[str, int | None]:
        """restore_misc."""
        return {"restore_misc": self.restore_misc}
