"""CPUID feature words with their bits' names, as /proc/cpuinfo spells them (Intel SDM volume 2, AMD APM volume 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from asyncvmm.x86.cpuid import CpuidEntry

Word = tuple[int, int, str]
"""CPUID function, index, and register."""

_NAMES: Final[dict[Word, str]] = {
    (0x1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca "
        "sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (0x1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx "
        "fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (0x7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds "
        "mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er "
        "avx512cd sha_ni avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri "
        "movdir64b enqcmd sgx_lc pks"
    ),
    (0x7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear "
        "rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 "
        "avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities "
        "spec_ctrl_ssbd"
    ),
    (0x7, 1, "eax"): (
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - - - - fzrm fsrs fsrc - - - - fred lkgs - - amx_fp16 - avx_ifma - - lam"
    ),
    (0xD, 0, "eax"): (
        "x87 sse_state avx_state bndregs bndcsr avx512_opmask avx512_zmm_hi256 avx512_hi16_zmm pt pkru - "
        "cet_u cet_s - - - - xtilecfg xtiledata"
    ),
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x80000001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
        "wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc "
        "mwaitx"
    ),
    (0x80000001, 0, "edx"): (
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x80000007, 0, "edx"): "- - - - - - - - constant_tsc",
    (0x80000008, 0, "ebx"): (
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - "
        "amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no"
    ),
    (0x40000001, 0, "eax"): (
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi "
        "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control "
        "kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - "
        "- - - - - kvm_clocksource_stable"
    ),
}

WORDS: Final = tuple(_NAMES)

_NOT_THE_PROCESSORS: Final[dict[Word, int]] = {
    # The guest's own switches (OSXSAVE, OSPKE), what topology decides (HTT), and what KVM's local APIC provides
    # whatever the list of supported features says (TSC deadline, x2APIC, hypervisor).
    (0x1, 0, "ecx"): 1 << 27 | 1 << 24 | 1 << 21 | 1 << 31,
    (0x1, 0, "edx"): 1 << 28 | 1 << 9,
    (0x7, 0, "ecx"): 1 << 4,
}


def feature_words(entries: Iterable[CpuidEntry]) -> dict[Word, int]:
    """The words that are there, without what is no feature of the processor's."""
    found = {(entry.function, entry.index): entry for entry in entries}
    return {
        word: getattr(found[word[:2]], word[2]) & ~_NOT_THE_PROCESSORS.get(word, 0)
        for word in WORDS
        if word[:2] in found
    }


def feature_names(word: Word, bits: int) -> list[str]:
    """The names of the bits that are set; of one without a name its place."""
    names = _NAMES[word].split()
    function, index, register = word
    return [
        names[bit] if bit < len(names) and names[bit] != "-" else f"cpuid {function:#x}.{index} {register} bit {bit}"
        for bit in range(32)
        if bits >> bit & 1
    ]


def vendor_of(entries: Iterable[CpuidEntry]) -> str:
    """The twelve letters of leaf 0; empty where there is none."""
    for entry in entries:
        if entry.function == 0:
            registers = (entry.ebx, entry.edx, entry.ecx)
            letters = b"".join(register.to_bytes(4, "little") for register in registers)
            return letters.decode("ascii", "replace").rstrip("\0")
    return ""


def model_of(entries: Iterable[CpuidEntry]) -> tuple[int, int, int]:
    """Family, model and stepping, the extended bits taken in (Intel SDM, CPUID leaf 1)."""
    signature = next((entry.eax for entry in entries if entry.function == 1), 0)
    family, model, stepping = signature >> 8 & 0xF, signature >> 4 & 0xF, signature & 0xF
    if family in (6, 15):
        model |= signature >> 12 & 0xF0
    if family == 15:
        family += signature >> 20 & 0xFF
    return family, model, stepping
