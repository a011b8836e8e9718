from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.x86.cpuid import CpuidEntry, vcpu_cpuid

INTEL = {"ebx": 0x756E6547, "edx": 0x49656E69, "ecx": 0x6C65746E}
AMD = {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163}

KVM_FEATURES = 0x01007EFB


def supported(vendor: dict[str, int]) -> list[CpuidEntry]:
    """Entries such as KVM_GET_SUPPORTED_CPUID gives, in its order."""
    level_1 = 1 << 5 | 1
    level_3 = 3 << 5 | 3
    noise = 0xFFFFC000
    return [
        CpuidEntry(0, eax=0x1F, **vendor),
        CpuidEntry(1, eax=0x50654, ebx=0x07100800, ecx=0xFFFA3223 & ~(1 << 24) & ~(1 << 31), edx=0x0FABFBFF),
        CpuidEntry(4, 0, 1, eax=level_1 | noise),
        CpuidEntry(4, 1, 1, eax=level_3 | noise),
        CpuidEntry(4, 2, 1, eax=0),
        CpuidEntry(7, 0, 1, eax=2, ebx=0xD19F4FBB, ecx=0x1C, edx=0xAC000400),
        CpuidEntry(0xA, eax=0x08300802, edx=0x603),
        CpuidEntry(0xB, 0, 1),
        CpuidEntry(0x15),
        CpuidEntry(0x16),
        CpuidEntry(0x1F, 0, 1),
        CpuidEntry(0x40000000, eax=0x40000001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
        CpuidEntry(0x40000001, eax=KVM_FEATURES),
        CpuidEntry(0x80000000, eax=0x80000022),
        CpuidEntry(0x80000001, ecx=0x1 | 1 << 2 | 1 << 23, edx=0x2C100800),
        CpuidEntry(0x80000008, eax=0x302E, ecx=0x4000 | 1 << 16),
        CpuidEntry(0x8000000A, eax=1, ebx=8, edx=0xFFFF),
        CpuidEntry(0x8000001D, 0, 1, eax=level_3 | noise),
        CpuidEntry(0x8000001E, eax=0x11, ebx=0x0105, ecx=0x102),
        CpuidEntry(0x80000022, eax=1, ebx=6),
    ]


def leaf(entries: tuple[CpuidEntry, ...], function: int, index: int = 0) -> CpuidEntry:
    found = [entry for entry in entries if (entry.function, entry.index) == (function, index)]
    assert len(found) == 1
    return found[0]


@given(vcpus=st.integers(1, 254), data=st.data(), vendor=st.sampled_from([INTEL, AMD]))
def test_a_vcpu_s_apic_id_is_its_index_wherever_it_is_told(
    vcpus: int, data: st.DataObject, vendor: dict[str, int]
) -> None:
    vcpu = data.draw(st.integers(0, vcpus - 1))
    entries = vcpu_cpuid(supported(vendor), vcpu=vcpu, vcpus=vcpus, tsc_khz=2_000_000)
    assert leaf(entries, 1).ebx >> 24 == vcpu
    for function in (0xB, 0x1F):
        assert {leaf(entries, function, index).edx for index in range(3)} == {vcpu}
    if vendor is AMD:
        assert leaf(entries, 0x8000001E).eax == vcpu


@given(vcpus=st.integers(1, 254), vendor=st.sampled_from([INTEL, AMD]))
def test_the_topology_is_one_package_of_single_threaded_cores(vcpus: int, vendor: dict[str, int]) -> None:
    entries = vcpu_cpuid(supported(vendor), vcpu=0, vcpus=vcpus, tsc_khz=None)
    threads, cores, end = (leaf(entries, 0xB, index) for index in range(3))
    assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 0x100)
    assert (cores.ebx, cores.ecx) == (vcpus, 0x201)
    assert 1 << cores.eax >= vcpus
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert vcpus <= leaf(entries, 1).ebx >> 16 & 0xFF
    assert bool(leaf(entries, 1).edx & 1 << 28) == (vcpus > 1)


def test_third_level_caches_are_shared_and_first_level_ones_are_not() -> None:
    entries = vcpu_cpuid(supported(INTEL), vcpu=1, vcpus=3, tsc_khz=None)
    assert leaf(entries, 4, 0).eax == 1 << 5 | 1 | 3 << 26
    assert leaf(entries, 4, 1).eax == 3 << 5 | 3 | 3 << 14 | 3 << 26
    assert leaf(entries, 4, 2).eax == 0


def test_amd_s_leaves_tell_cores_nodes_and_shared_caches() -> None:
    entries = vcpu_cpuid(supported(AMD), vcpu=2, vcpus=3, tsc_khz=None)
    assert leaf(entries, 0x80000008).ecx == 2 | 2 << 12 | 1 << 16
    node = leaf(entries, 0x8000001E)
    assert (node.eax, node.ebx, node.ecx) == (2, 2, 0)
    assert leaf(entries, 0x8000001D).eax == 3 << 5 | 3 | 3 << 14


def test_amd_s_core_count_is_not_written_on_intel() -> None:
    entries = vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=8, tsc_khz=None)
    assert leaf(entries, 0x80000008) == next(entry for entry in supported(INTEL) if entry.function == 0x80000008)


@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_the_clocks_are_told_so_that_nothing_need_be_calibrated(vendor: dict[str, int]) -> None:
    entries = vcpu_cpuid(supported(vendor), vcpu=0, vcpus=1, tsc_khz=2_893_202)
    assert leaf(entries, 0x40000000).eax == 0x40000010
    timing = leaf(entries, 0x40000010)
    assert (timing.eax, timing.ebx) == (2_893_202, 1_000_000)
    assert leaf(entries, 0x40000001).eax == KVM_FEATURES


def test_intel_s_crystal_is_the_apic_s_clock_and_gives_the_tsc_s_frequency() -> None:
    entries = vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=1, tsc_khz=2_893_202)
    ratio = leaf(entries, 0x15)
    assert ratio.ecx == 1_000_000_000
    assert ratio.ecx * ratio.ebx // ratio.eax == 2_893_202_000
    assert leaf(entries, 0x16).eax == 2893


def test_an_unknown_tsc_frequency_is_not_told() -> None:
    entries = vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=1, tsc_khz=None)
    assert leaf(entries, 0x40000000).eax == 0x40000001
    assert all(entry.function != 0x40000010 for entry in entries)
    assert leaf(entries, 0x15) == CpuidEntry(0x15)


def test_hypervisor_and_tsc_deadline_are_set_and_nothing_else_is_added() -> None:
    before = supported(INTEL)[1].ecx
    after = leaf(vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=1, tsc_khz=None), 1).ecx
    assert after & ~before == 1 << 31 | 1 << 24
    without = leaf(vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=1, tsc_khz=None, tsc_deadline=False), 1).ecx
    assert without & ~before == 1 << 31


@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_performance_counters_and_nested_virtualisation_are_not_offered(vendor: dict[str, int]) -> None:
    entries = vcpu_cpuid(supported(vendor), vcpu=0, vcpus=1, tsc_khz=None)
    for function in (0xA, 0x8000000A, 0x80000022):
        assert leaf(entries, function) == CpuidEntry(function)
    assert not leaf(entries, 1).ecx & (1 << 5 | 1 << 15)
    assert not leaf(entries, 0x80000001).ecx & (1 << 2 | 1 << 23)


def test_other_leaves_pass_unchanged() -> None:
    entries = vcpu_cpuid(supported(INTEL), vcpu=0, vcpus=4, tsc_khz=2_000_000)
    assert leaf(entries, 7) == CpuidEntry(7, 0, 1, eax=2, ebx=0xD19F4FBB, ecx=0x1C, edx=0xAC000400)


@given(
    st.lists(
        st.builds(
            CpuidEntry,
            st.sampled_from([0, 1, 4, 0xB, 0x15, 0x40000000, 0x80000008, 0x8000001D]) | st.integers(0, 2**32 - 1),
            *[st.integers(0, 2**32 - 1)] * 6,
        ),
        max_size=20,
    ),
    st.integers(1, 254),
)
def test_registers_stay_32_bits_whatever_the_host_reports(entries: list[CpuidEntry], vcpus: int) -> None:
    for entry in vcpu_cpuid(entries, vcpu=vcpus - 1, vcpus=vcpus, tsc_khz=3_000_000):
        assert all(0 <= register < 1 << 32 for register in (entry.eax, entry.ebx, entry.ecx, entry.edx))
