from __future__ import annotations

import attrs
import pytest

from asyncvmm.timing.profiles import GuestBootProfile
from asyncvmm.timing.vm_timing import VmTiming


def test_the_total_is_setup_and_boot() -> None:
    assert VmTiming(setup_ms=3, boot_ms=40, guest_wait_ms=30).total_ms == 43


@pytest.mark.parametrize("timing", [VmTiming(), VmTiming(setup_ms=3), VmTiming(boot_ms=40)])
def test_half_a_total_is_no_total(timing: VmTiming) -> None:
    assert timing.total_ms is None
    assert "total_ms" not in timing.to_dict()


def test_what_was_not_recorded_is_left_out_and_zero_is_not() -> None:
    timing = VmTiming(setup_ms=0, boot_ms=40, gvproxy_start_ms=0, boot_retries=0)
    assert timing.to_dict() == {"setup_ms": 0, "boot_ms": 40, "gvproxy_start_ms": 0, "boot_retries": 0, "total_ms": 40}


def test_the_fields_are_those_of_the_interface() -> None:
    assert [field.name for field in attrs.fields(VmTiming)] == [
        "setup_ms",
        "boot_ms",
        "overlay_ms",
        "qemu_cmd_build_ms",
        "gvproxy_start_ms",
        "qemu_fork_ms",
        "guest_wait_ms",
        "boot_retries",
    ]


def test_a_record_does_not_change() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        VmTiming().setup_ms = 1  # type: ignore[misc]


def test_a_guest_profile_lists_the_stages_it_has_in_boot_order() -> None:
    profile = GuestBootProfile(ready_ns=9, init_entry_ns=0)
    assert list(profile.to_dict().items()) == [("init_entry_ns", 0), ("ready_ns", 9)]
