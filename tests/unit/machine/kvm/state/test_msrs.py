from __future__ import annotations

from asyncvmm.machine.kvm.state.msrs import (
    ALLOWED,
    IA32_TIME_STAMP_COUNTER,
    IA32_TSC_DEADLINE,
    is_at_reset,
    msr_indices,
)
from asyncvmm.x86.cpuid import CpuidEntry

LSTAR, PAT, TSC_AUX, SYSTEM_TIME_NEW = 0xC0000082, 0x277, 0xC0000103, 0x4B564D01
HYPERV_GUEST_OS_ID, PERF_GLOBAL_CTRL = 0x40000000, 0x38F


def test_what_kvm_lists_is_saved_if_it_is_a_guests_state() -> None:
    listed = (LSTAR, HYPERV_GUEST_OS_ID, PERF_GLOBAL_CTRL, IA32_TIME_STAMP_COUNTER, IA32_TSC_DEADLINE)
    assert msr_indices(listed, ()) == (LSTAR,)


def test_what_cpuid_offers_is_saved_though_kvm_does_not_list_it() -> None:
    entries = (
        CpuidEntry(0x1, edx=1 << 16),
        CpuidEntry(0x80000001, edx=1 << 27),
        CpuidEntry(0x40000001, eax=1 << 3),
    )
    assert {PAT, TSC_AUX, SYSTEM_TIME_NEW} <= set(msr_indices((), entries))
    assert msr_indices((), ()) == ()


def test_all_that_may_be_saved_may_be_restored() -> None:
    everything = [CpuidEntry(leaf, eax=~0, ebx=~0, ecx=~0, edx=~0) for leaf in (0x1, 0x7, 0x80000001, 0x40000001)]
    assert set(msr_indices(range(0x2000), everything)) <= ALLOWED


def test_indices_come_ascending_and_once() -> None:
    found = msr_indices((LSTAR, PAT, PAT), (CpuidEntry(0x1, edx=1 << 16),))
    assert found == (PAT, LSTAR)


def test_only_registers_of_which_there_are_many_are_left_out_and_only_as_they_are_at_reset() -> None:
    assert is_at_reset(0x200, 0)
    assert not is_at_reset(0x200, 1)
    assert not is_at_reset(PAT, 0)
