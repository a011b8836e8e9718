"""The table of profile fields is complete, and its check sees what is wrong."""

from __future__ import annotations

import pytest

from asyncvmm import VmTiming
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.profiles import CreateVmProfile, GuestBootProfile, VcpuSetupProfile
from tests.support.profile_table import ANY, MEASURED, SOME, TABLE, ZERO, Absent, Record, Rule, objection, values

KINDS: dict[str, type[Record]] = {
    kind.__name__: kind for kind in (VmTiming, GuestBootProfile, BootProfile, CreateVmProfile, VcpuSetupProfile)
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_and_total_of_every_profile_has_its_row(kind: str) -> None:
    assert TABLE[kind].keys() == values(KINDS[kind]()).keys()
    assert TABLE.keys() == KINDS.keys()


def test_what_is_measured_where_there_is_something_to_measure_has_a_row_for_where_there_is_not() -> None:
    assert TABLE["VmTiming"].keys() >= MEASURED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_apply_has_a_reason(kind: str) -> None:
    for row in TABLE[kind].values():
        assert all(rule.reason for rule in (row.kvm, row.qemu) if isinstance(rule, Absent))


@pytest.mark.parametrize(
    ("rule", "value", "wrong"),
    [
        (SOME, 1, None),
        (SOME, 0, "cannot be 0"),
        (SOME, None, "not recorded"),
        (SOME, -1, "cannot be -1"),
        (SOME, GuestBootProfile(), None),
        (ANY, 0, None),
        (ANY, False, None),
        (ANY, None, "not recorded"),
        (ANY, -1, "cannot be -1"),
        (ZERO, 0, None),
        (ZERO, 1, "expected 0, found 1"),
        (Absent("none"), None, None),
        (Absent("none"), 0, "expected None (none), found 0"),
    ],
)
def test_a_value_is_held_against_its_rule(rule: Rule, value: object, wrong: str | None) -> None:
    assert objection(rule, value) == wrong
