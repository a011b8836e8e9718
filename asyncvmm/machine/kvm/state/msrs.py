"""Which model-specific registers are a vCPU's state: what KVM lists and we know, and what the guest's CPUID implies.

Facts: Intel SDM volume 4; AMD APM volume 2, appendix A; Linux Documentation/virt/kvm/x86/msr.rst and cpuid.rst;
KVM_GET_MSR_INDEX_LIST in Documentation/virt/kvm/api.rst, which leaves some out that KVM emulates (MTRRs, PAT).

Not here: what KVM_GET_SREGS has (EFER, FS and GS base, APIC base), the TSC and its deadline, which are restored in an
order of their own, and whatever belongs to what no guest is offered (performance counters, nesting, Hyper-V).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from asyncvmm.x86.cpuid import CpuidEntry

IA32_TIME_STAMP_COUNTER: Final = 0x10
IA32_TSC_DEADLINE: Final = 0x6E0

_SYSENTER = range(0x174, 0x177)
_MACHINE_CHECK = (0x17A, 0x17B)
_MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
_PAT = 0x277
_BANKS = range(0x400, 0x480)
_TSC_ADJUST, _TSC_AUX = 0x3B, 0xC0000103
_SYSCALL = (*range(0xC0000081, 0xC0000085), 0xC0000102)
_KVM = range(0x4B564D00, 0x4B564D09)

ALLOWED: Final = frozenset(
    {
        *(0x11, 0x12),  # KVM's wall clock and system time, first edition
        *(0x3A, _TSC_ADJUST),  # IA32_FEATURE_CONTROL
        *(0x48, 0x8B, 0x9E),  # IA32_SPEC_CTRL, IA32_BIOS_SIGN_ID, IA32_SMBASE
        *(0xCE, 0xE1),  # MSR_PLATFORM_INFO, IA32_UMWAIT_CONTROL
        *(0x10A, 0x122, 0x140),  # IA32_ARCH_CAPABILITIES, IA32_TSX_CTRL, MISC_FEATURES_ENABLES
        *_SYSENTER,
        *_MACHINE_CHECK,
        *(0x1A0, 0x1C4, 0x1C5, 0x1D9),  # IA32_MISC_ENABLE, IA32_XFD, IA32_XFD_ERR, IA32_DEBUGCTL
        *_MTRRS,
        _PAT,
        *_BANKS,
        0x4D0,  # IA32_MCG_EXT_CTL
        *(0x6A0, 0x6A2, *range(0x6A4, 0x6A9)),  # CET
        *(0xD90, 0xDA0),  # IA32_BNDCFGS, IA32_XSS
        *_SYSCALL,
        *(_TSC_AUX, 0xC0000104),  # MSR_AMD64_TSC_RATIO
        *(0xC0010015, 0xC001001F, 0xC001011F, 0xC0010140, 0xC0010141, 0xC0011029),  # HWCR, NB_CFG, SSBD, OSVW, DE_CFG
        *_KVM,
    }
)
"""What is saved, and all that a saved vCPU may bring along."""

_IMPLIED: Final[Sequence[tuple[int, int, str, int, Iterable[int]]]] = (
    (0x1, 0, "edx", 7, _MACHINE_CHECK[:1]),
    (0x1, 0, "edx", 11, _SYSENTER),
    (0x1, 0, "edx", 12, _MTRRS),
    (0x1, 0, "edx", 14, (*_MACHINE_CHECK, *_BANKS)),
    (0x1, 0, "edx", 16, (_PAT,)),
    (0x7, 0, "ebx", 1, (_TSC_ADJUST,)),
    (0x7, 0, "ecx", 22, (_TSC_AUX,)),
    (0x80000001, 0, "edx", 27, (_TSC_AUX,)),
    (0x80000001, 0, "edx", 29, _SYSCALL),
    (0x40000001, 0, "eax", 0, (0x11, 0x12)),
    (0x40000001, 0, "eax", 3, (0x4B564D00, 0x4B564D01)),
    (0x40000001, 0, "eax", 4, (0x4B564D02,)),
    (0x40000001, 0, "eax", 5, (0x4B564D03,)),
    (0x40000001, 0, "eax", 6, (0x4B564D04,)),
    (0x40000001, 0, "eax", 12, (0x4B564D05,)),
    (0x40000001, 0, "eax", 14, (0x4B564D06, 0x4B564D07)),
    (0x40000001, 0, "eax", 17, (0x4B564D08,)),
)
"""CPUID function, index, register and bit, and the MSRs that are there if it is set."""

_ZERO_AT_RESET: Final = frozenset((*_MTRRS, *_BANKS))
"""Registers of which there are many that hardly a guest touches."""


def msr_indices(listed: Iterable[int], cpuid: Iterable[CpuidEntry]) -> tuple[int, ...]:
    """The registers to save, ascending. ``listed`` is KVM_GET_MSR_INDEX_LIST's answer, ``cpuid`` the guest's."""
    found = {(entry.function, entry.index): entry for entry in cpuid}
    wanted = ALLOWED.intersection(listed)
    for function, index, register, bit, msrs in _IMPLIED:
        entry = found.get((function, index))
        if entry is not None and getattr(entry, register) >> bit & 1:
            wanted |= set(msrs)
    return tuple(sorted(wanted))


def is_at_reset(index: int, value: int) -> bool:
    """Whether a new vCPU has that value there on every host, so that it need not be saved."""
    return not value and index in _ZERO_AT_RESET
