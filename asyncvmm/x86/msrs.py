"""Model-specific registers that a vCPU needs before its first instruction; all others keep KVM's reset values.

Facts: Intel SDM volume 4 (IA32_MISC_ENABLE) and volume 3, 12.11.2.1 (IA32_MTRR_DEF_TYPE).
"""

from __future__ import annotations

IA32_MISC_ENABLE = 0x1A0
IA32_MTRR_DEF_TYPE = 0x2FF
FAST_STRINGS = 1 << 0
MTRR_ENABLE = 1 << 11
MTRR_WRITE_BACK = 6

_ZEROED = (
    0x174,  # IA32_SYSENTER_CS
    0x175,  # IA32_SYSENTER_ESP
    0x176,  # IA32_SYSENTER_EIP
    0xC0000081,  # IA32_STAR
    0xC0000082,  # IA32_LSTAR
    0xC0000083,  # IA32_CSTAR
    0xC0000084,  # IA32_FMASK
    0xC0000102,  # IA32_KERNEL_GS_BASE
)


def boot_msrs() -> tuple[tuple[int, int], ...]:
    """(index, value) pairs for KVM_SET_MSRS.

    All memory is write-back by default. The fixed-range MTRRs stay off: they are zero, which would make everything
    below 1 MiB uncacheable, firmware tables included.
    """
    return (
        *((index, 0) for index in _ZEROED),
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    )
