"""Profiles come from phases: each field from the phase that its name says, and nothing is lost between them."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import attrs

from asyncvmm.timing.derive import (
    boot_profile,
    create_vm_profile,
    restore_profile,
    runtime_restore_profile,
    vcpu_setup_profile,
)
from asyncvmm.timing.profiles import GuestBootProfile, RestoreProfile, RuntimeRestoreProfile, VcpuSetupProfile
from asyncvmm.timing.timeline import Phase, Timeline

GUEST = GuestBootProfile(init_entry_ns=1)
ON_QEMU = {"create_vm_total", "boot_wait", "cold_start_total", "create_vm_misc"}

Tree = dict[str, "Tree"]

KVM: Tree = {
    "setup": {"kernel_asset_read": {}, "rootfs_asset_open": {}, "layout": {}},
    "boot": {
        "kvm_open": {},
        "vm_create": {"kvm_create_vm": {}, "vm_arch_setup": {}},
        "memory": {"memory_alloc": {}, "memory_register": {}},
        "irqchip_create": {},
        "vcpu_create": {},
        "rootfs_load": {},
        "kernel_load": {},
        "boot_params": {},
        "vcpu_config": {"cpuid_config": {}, "register_config": {}},
        "vm_finish": {},
        "vcpu_start": {},
        "boot_wait": {},
    },
}
QEMU: Tree = {"setup": {}, "boot": {"qemu_cmd_build": {}, "qemu_fork": {}, "qemu_qmp_connect": {}, "boot_wait": {}}}


def recorded(tree: Tree) -> Timeline:
    """A timeline whose clock ticks a nanosecond with each look."""
    timeline = Timeline(count(1000).__next__)
    _record(timeline, tree)
    return timeline


def _record(timeline: Timeline, tree: Tree) -> None:
    for name, inner in tree.items():
        with timeline.phase(name):
            _record(timeline, inner)


def test_on_kvm_every_field_of_a_boot_is_there() -> None:
    timeline = recorded(KVM)
    profile = boot_profile(timeline.phases, timeline.start_ns, GUEST)
    assert all(getattr(profile, field.name) is not None for field in attrs.fields(type(profile)))
    assert profile.guest is GUEST
    ends = {phase.name: phase.end_ns - timeline.start_ns for phase in timeline.phases}
    assert profile.t_kvm_open == ends["kvm_open"]
    assert profile.t_vcpu_setup == ends["vcpu_config"]
    assert profile.t_boot_ready == profile.t_total_end == ends["boot_wait"]


def test_marks_of_a_boot_stand_in_order() -> None:
    timeline = recorded(KVM)
    profile = boot_profile(timeline.phases, timeline.start_ns, GUEST)
    marks = [profile.t_total_start, profile.t_kvm_open, profile.t_vm_create, profile.t_memory_setup]
    marks += [profile.t_rootfs_load, profile.t_kernel_load, profile.t_vcpu_setup, profile.t_boot_start]
    known = [mark for mark in marks if mark is not None]
    assert len(known) == len(marks)
    assert known == sorted(known)


def test_the_steps_of_a_boot_make_up_its_total() -> None:
    timeline = recorded(KVM)
    profile = boot_profile(timeline.phases, timeline.start_ns, GUEST)
    assert sum(step or 0 for step in profile.steps().values()) == profile.total


def test_on_kvm_every_field_of_a_creation_is_there() -> None:
    profile = create_vm_profile(recorded(KVM).phases)
    assert all(getattr(profile, field.name) is not None for field in attrs.fields(type(profile)))
    assert profile.profiled_create_vm_total is not None
    assert profile.create_vm_total is not None
    assert profile.profiled_create_vm_total + (profile.create_vm_misc or 0) == profile.create_vm_total


def test_reserving_addresses_is_architecture_not_creation() -> None:
    timeline = recorded(KVM)
    took = timeline.durations()
    profile = create_vm_profile(timeline.phases)
    assert profile.kvm_create_vm == took["kvm_create_vm"]
    assert profile.vm_arch_setup == took["vm_arch_setup"] + took["irqchip_create"]


def test_on_qemu_only_the_totals_of_a_creation_are_known() -> None:
    timeline = recorded(QEMU)
    profile = create_vm_profile(timeline.phases)
    assert set(profile.to_dict()) == ON_QEMU
    assert vcpu_setup_profile(timeline.phases) is None
    boot = boot_profile(timeline.phases, timeline.start_ns, GUEST)
    assert {name for name, step in boot.steps().items() if step is not None} == {"boot_wait", "host_misc"}


def test_the_vcpu_s_setup_is_told_apart() -> None:
    assert vcpu_setup_profile(recorded(KVM).phases) == VcpuSetupProfile(cpuid_config=1, register_config=1)


def test_of_a_boot_that_never_began_there_is_nothing() -> None:
    assert create_vm_profile([]).to_dict() == {}
    assert boot_profile([], 0, GUEST).total is None
    assert vcpu_setup_profile([]) is None


def test_a_step_that_failed_has_a_duration_and_no_mark() -> None:
    timeline = Timeline(count().__next__)
    with suppress(ZeroDivisionError), timeline.phase("boot"), timeline.phase("kernel_load"):
        raise ZeroDivisionError
    profile = boot_profile(timeline.phases, timeline.start_ns, GUEST)
    assert (profile.t_total_start, profile.t_kernel_load, profile.kernel_load_duration) == (1, None, 1)


RESTORE = ("kvm_open", "kvm_create_vm", "vm_arch_setup", "memory_alloc", "memory_register", "irqchip_create")
RESTORE_ON = (*RESTORE, "vcpu_create", "cpuid_config", "memory_state_write", "vcpu_state_restore")


def phases_of(*names: str) -> list[Phase]:
    """Of 1 ns, 2 ns, 3 ns and so on."""
    return [Phase(name, 0, duration) for duration, name in enumerate(names, 1)]


def test_every_field_of_a_restore_is_there() -> None:
    profile = restore_profile(phases_of(*RESTORE_ON, "device_state_restore", "resume_kvm_run", "total"))
    assert None not in attrs.astuple(profile)
    assert profile == RestoreProfile(
        kvm_fd_open=1,
        kvm_create_vm=2,
        vm_arch_setup=3 + 6,
        guest_memory_mmap=4,
        kvm_set_user_memory_region=5,
        vcpu_creation=7,
        cpuid_config=8,
        memory_state_write=9,
        vcpu_state_restore=10,
        device_state_restore=11,
        resume_kvm_run=12,
        restore_total=13,
    )


def test_what_qemu_takes_until_it_has_made_its_machine_is_what_the_architecture_took() -> None:
    phases = phases_of("qemu_cmd_build", "memory_state_write", "qemu_fork", "qemu_qmp_connect", "device_state_restore")
    profile = restore_profile(phases)
    assert profile == RestoreProfile(vm_arch_setup=1 + 3 + 4, memory_state_write=2, device_state_restore=5)
    assert profile.total_without_resume == sum(phase.duration_ns for phase in phases)


def test_a_step_that_is_made_in_parts_counts_with_all_of_them() -> None:
    """Interrupt controllers in the chain, the board and the devices by themselves; the file, and what is prefetched."""
    parts = ("memory_state_write", "device_state_restore", "memory_state_write", "device_state_restore")
    profile = restore_profile(phases_of(*parts))
    assert (profile.memory_state_write, profile.device_state_restore) == (1 + 3, 2 + 4)


def test_a_restore_into_a_shell_has_a_profile_of_its_own() -> None:
    steps = ("memory_state_write", "vcpu_state_restore", "device_state_restore", "total")
    found = runtime_restore_profile(phases_of(*steps))
    assert found == RuntimeRestoreProfile(vcpu_state_restore=2, device_state_restore=3, restore_total=4)
