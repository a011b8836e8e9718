"""What CPUID says on one vCPU: KVM's supported entries, with this machine's topology and clocks written into them.

The topology is one package with one thread in each core; a vCPU's APIC ID is its index. Features are only taken away,
never added, but for the two that the in-kernel local APIC and KVM itself provide: TSC deadline and "hypervisor".

Facts: Intel SDM volume 2 (CPUID), AMD APM volume 3 (appendix E), Linux Documentation/virt/kvm/x86/cpuid.rst, and the
timing leaf 0x40000010 that VMware introduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry is for one sub-leaf."""

KVM_SIGNATURE_LEAF = 0x40000000
KVM_TIMING_LEAF = 0x40000010
APIC_BUS_KHZ = 1_000_000
"""KVM's local APIC timer counts nanoseconds."""

_VMX = 1 << 5
_PDCM = 1 << 15
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_HTT = 1 << 28
_SVM = 1 << 2
_PERFCTR_CORE = 1 << 23
_PERFCTR_NB = 1 << 24
_LEVEL_THREAD = 1 << 8
_LEVEL_CORE = 2 << 8
_CACHE_TYPE = 0x1F
_CACHE_LEVEL_3 = 3
_MAX_8_BITS = 255
_MAX_6_BITS = 63

_TOPOLOGY_LEAVES = (0xB, 0x1F)
_CACHE_LEAVES = (0x4, 0x8000001D)
_ZEROED_LEAVES = (0xA, 0x8000000A, 0x80000022)
"""Performance counters (Intel, AMD) and nested SVM: not offered, for no snapshot would carry their state."""


@attrs.frozen
class CpuidEntry:
    """struct kvm_cpuid_entry2: the answer to CPUID with EAX=function (and ECX=index, if the flag says so)."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@attrs.frozen(kw_only=True)
class CpuTopology:
    """One vCPU's place: its index, how many there are, and whether the host is AMD's (or Hygon's) kind."""

    vcpu: int
    vcpus: int
    amd: bool

    @property
    def apic_id_bits(self) -> int:
        """How many bits of the APIC ID tell the package's cores apart."""
        return (self.vcpus - 1).bit_length()

    @property
    def addressable_ids(self) -> int:
        """How many APIC IDs these bits can name."""
        return 1 << self.apic_id_bits


def vcpu_cpuid(
    supported: Sequence[CpuidEntry],
    *,
    vcpu: int,
    vcpus: int,
    tsc_khz: int | None,
    tsc_deadline: bool = True,
) -> tuple[CpuidEntry, ...]:
    """The entries for KVM_SET_CPUID2 of vCPU number ``vcpu``, from those of KVM_GET_SUPPORTED_CPUID.

    ``tsc_khz`` is the guest's TSC frequency, None where it is not known; ``tsc_deadline`` says whether the host has
    KVM_CAP_TSC_DEADLINE_TIMER with its in-kernel local APIC.
    """
    topology = CpuTopology(vcpu=vcpu, vcpus=vcpus, amd=_is_amd(supported))
    entries: list[CpuidEntry] = []
    for entry in supported:
        if entry.function in _TOPOLOGY_LEAVES:
            if entry.index == 0:
                entries += _extended_topology(entry.function, topology)
        elif entry.function != KVM_TIMING_LEAF:
            entries.append(_entry_for(entry, topology, tsc_khz, tsc_deadline))
    return _with_timing_leaf(entries, tsc_khz)


def _entry_for(entry: CpuidEntry, topology: CpuTopology, tsc_khz: int | None, tsc_deadline: bool) -> CpuidEntry:
    function = entry.function
    if function == 0x1:
        return _features(entry, topology, tsc_deadline)
    if function in _CACHE_LEAVES:
        return _cache(entry, topology)
    if function in _ZEROED_LEAVES:
        return attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
    if function == 0x80000001:
        return attrs.evolve(entry, ecx=entry.ecx & ~(_SVM | _PERFCTR_CORE | _PERFCTR_NB))
    if topology.amd:
        return _amd_topology(entry, topology)
    return _intel_clocks(entry, tsc_khz) if tsc_khz else entry


def _features(entry: CpuidEntry, topology: CpuTopology, tsc_deadline: bool) -> CpuidEntry:
    ids = min(topology.addressable_ids, _MAX_8_BITS)
    ecx = entry.ecx & ~(_VMX | _PDCM | _TSC_DEADLINE) | _HYPERVISOR | (_TSC_DEADLINE if tsc_deadline else 0)
    return attrs.evolve(
        entry,
        ebx=entry.ebx & 0xFFFF | ids << 16 | topology.vcpu << 24,
        ecx=ecx,
        edx=entry.edx & ~_HTT | (_HTT if topology.vcpus > 1 else 0),
    )


def _cache(entry: CpuidEntry, topology: CpuTopology) -> CpuidEntry:
    """Deterministic cache parameters: the third level is shared by all cores, the others by none."""
    if not entry.eax & _CACHE_TYPE:
        return entry
    level = entry.eax >> 5 & 0x7
    sharing = topology.addressable_ids - 1 if level >= _CACHE_LEVEL_3 else 0
    cores = 0 if topology.amd else min(topology.addressable_ids - 1, _MAX_6_BITS)
    return attrs.evolve(entry, eax=entry.eax & 0x3FFF | sharing << 14 | cores << 26)


def _extended_topology(function: int, topology: CpuTopology) -> Iterable[CpuidEntry]:
    """Sub-leaves 0 (threads), 1 (cores) and 2 (the end) of leaf 0xb or 0x1f."""
    levels = (
        (0, 1, _LEVEL_THREAD),
        (topology.apic_id_bits, topology.vcpus, _LEVEL_CORE),
        (0, 0, 0),
    )
    return [
        CpuidEntry(function, index, SIGNIFICANT_INDEX, eax=shift, ebx=count, ecx=index | level, edx=topology.vcpu)
        for index, (shift, count, level) in enumerate(levels)
    ]


def _amd_topology(entry: CpuidEntry, topology: CpuTopology) -> CpuidEntry:
    if entry.function == 0x80000008:
        size = topology.vcpus - 1 | topology.apic_id_bits << 12
        return attrs.evolve(entry, ecx=entry.ecx & ~0xF0FF | size)
    if entry.function == 0x8000001E:
        # One thread in each core (EBX[15:8] = 0), one node in the package (ECX[10:8] = 0).
        return attrs.evolve(entry, eax=topology.vcpu, ebx=topology.vcpu, ecx=0, edx=0)
    return entry


def _intel_clocks(entry: CpuidEntry, tsc_khz: int) -> CpuidEntry:
    """Leaves 0x15 and 0x16. Linux takes the crystal for the local APIC timer's clock, so it must be KVM's 1 GHz."""
    if entry.function == 0x15:
        return attrs.evolve(entry, eax=APIC_BUS_KHZ, ebx=tsc_khz, ecx=APIC_BUS_KHZ * 1000, edx=0)
    if entry.function == 0x16:
        mhz = tsc_khz // 1000
        return attrs.evolve(entry, eax=mhz & 0xFFFF, ebx=mhz & 0xFFFF, ecx=0, edx=0)
    return entry


def _with_timing_leaf(entries: Sequence[CpuidEntry], tsc_khz: int | None) -> tuple[CpuidEntry, ...]:
    """Leaf 0x40000010 (EAX = TSC kHz, EBX = APIC bus kHz), and the signature leaf's maximum raised to it."""
    if not tsc_khz or not any(entry.function == KVM_SIGNATURE_LEAF for entry in entries):
        return tuple(entries)
    timing = CpuidEntry(KVM_TIMING_LEAF, eax=tsc_khz, ebx=APIC_BUS_KHZ)
    return (*(_raised(entry) for entry in entries), timing)


def _raised(entry: CpuidEntry) -> CpuidEntry:
    if entry.function != KVM_SIGNATURE_LEAF:
        return entry
    return attrs.evolve(entry, eax=max(entry.eax, KVM_TIMING_LEAF))


def _is_amd(entries: Iterable[CpuidEntry]) -> bool:
    vendors = {(entry.ebx, entry.edx, entry.ecx) for entry in entries if entry.function == 0}
    return any(_vendor_name(*registers) in (b"AuthenticAMD", b"HygonGenuine") for registers in vendors)


def _vendor_name(*registers: int) -> bytes:
    return b"".join(register.to_bytes(4, "little") for register in registers)
