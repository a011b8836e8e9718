"""Profiles keep the names and the sums that consumers count on."""

from __future__ import annotations

import attrs
import pytest

from asyncvmm.timing.profiles import (
    CreateVmProfile,
    GuestBootProfile,
    Profile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
)


def powers(kind: type[Profile]) -> dict[str, int]:
    """Each field a power of two, so that a sum says what is in it."""
    return {field.name: 1 << place for place, field in enumerate(attrs.fields(kind))}


def parts(total: int | None, values: dict[str, int]) -> set[str]:
    assert total is not None
    return {name for name, value in values.items() if total & value}


@pytest.mark.parametrize(
    "kind", [GuestBootProfile, CreateVmProfile, VcpuSetupProfile, RestoreProfile, RuntimeRestoreProfile]
)
def test_nothing_recorded_gives_an_empty_dict(kind: type[Profile]) -> None:
    assert kind().to_dict() == {}


def test_the_guest_stages_come_in_boot_order() -> None:
    profile = GuestBootProfile(ready_ns=5, init_entry_ns=1)
    assert list(profile.to_dict().items()) == [("init_entry_ns", 1), ("ready_ns", 5)]


def test_a_created_vm_sums_its_named_steps() -> None:
    values = powers(CreateVmProfile)
    profile = CreateVmProfile(**values)
    assert parts(profile.profiled_create_vm_total, values) == set(values) - {
        "vcpu_register_config",
        "cpuid_config",
        "create_vm_total",
        "boot_wait",
    }
    assert parts(profile.cold_start_total, values) == {
        "create_vm_total",
        "cpuid_config",
        "vcpu_register_config",
        "boot_wait",
    }


def test_what_the_named_steps_leave_is_misc_and_never_negative() -> None:
    assert CreateVmProfile(kvm_fd_open=3, boot_params=4, create_vm_total=10).create_vm_misc == 3
    assert CreateVmProfile(kvm_fd_open=30, create_vm_total=10).create_vm_misc == 0
    assert CreateVmProfile(kvm_fd_open=30).create_vm_misc is None


def test_a_restore_sums_all_but_its_resumption() -> None:
    values = powers(RestoreProfile)
    profile = RestoreProfile(**values)
    assert parts(profile.total_without_resume, values) == set(values) - {"resume_kvm_run", "restore_total"}
    assert parts(profile.total_with_resume, values) == set(values) - {"restore_total"}


@pytest.mark.parametrize("kind", [RestoreProfile, RuntimeRestoreProfile])
def test_what_the_steps_of_a_restore_leave_of_it_is_told_as_well(
    kind: type[RestoreProfile] | type[RuntimeRestoreProfile],
) -> None:
    steps = {"vcpu_state_restore": 3, "device_state_restore": 4}
    assert kind(**steps, restore_total=10).restore_misc == 3
    assert kind(**steps, restore_total=5).restore_misc == 0
    assert kind(**steps).restore_misc is None
    assert kind(**steps, restore_total=10).to_dict().items() >= {"restore_total": 10, "restore_misc": 3}.items()


def test_resuming_is_no_part_of_what_a_restores_misc_is_left_of() -> None:
    assert RestoreProfile(kvm_fd_open=1, resume_kvm_run=5, restore_total=3).restore_misc == 2


def test_a_dict_holds_the_derived_totals_too() -> None:
    assert RestoreProfile(kvm_fd_open=1, resume_kvm_run=2).to_dict() == {
        "kvm_fd_open": 1,
        "resume_kvm_run": 2,
        "total_without_resume": 1,
        "total_with_resume": 3,
    }
