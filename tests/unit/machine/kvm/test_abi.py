"""Numbers and sizes against the kernel's own header."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from asyncvmm.machine.kvm import abi, dirty_gfns

STRUCTURES = {
    "kvm_regs": abi.KvmRegs,
    "kvm_sregs": abi.KvmSregs,
    "kvm_lapic_state": abi.KvmLapicState,
    "kvm_mp_state": abi.KvmMpState,
    "kvm_xcrs": abi.KvmXcrs,
    "kvm_debugregs": abi.KvmDebugregs,
    "kvm_vcpu_events": abi.KvmVcpuEvents,
    "kvm_irqchip": abi.KvmIrqchip,
    "kvm_pit_state2": abi.KvmPitState2,
    "kvm_clock_data": abi.KvmClockData,
    "kvm_device_attr": abi.KvmDeviceAttr,
    "kvm_enable_cap": abi.KvmEnableCap,
    "kvm_irq_level": abi.KvmIrqLevel,
    "kvm_msr_entry": abi.KvmMsrEntry,
    "kvm_cpuid_entry2": abi.KvmCpuidEntry2,
    "kvm_userspace_memory_region": abi.KvmUserspaceMemoryRegion,
}


def told_by_c(tmp_path: Path, expressions: list[str]) -> list[int]:
    prints = "".join(f'printf("%lu\\n", (unsigned long)({expression}));' for expression in expressions)
    source, program = tmp_path / "numbers.c", tmp_path / "numbers"
    headers = "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
    source.write_text(f"{headers}int main(void) {{ {prints} }}")
    subprocess.run(["gcc", "-o", program, source], check=True, timeout=60)
    done = subprocess.run([program], check=True, timeout=60, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.requires("gcc")
def test_requests_and_capabilities_are_those_of_linux_kvm_h(tmp_path: Path) -> None:
    members = {**abi.Request.__members__, **abi.Capability.__members__}
    assert told_by_c(tmp_path, list(members)) == [int(member) for member in members.values()]


@pytest.mark.requires("gcc")
def test_structures_have_the_kernels_sizes_and_fields_their_places(tmp_path: Path) -> None:
    sizes = [f"sizeof(struct {name})" for name in STRUCTURES]
    assert told_by_c(tmp_path, sizes) == [ctypes.sizeof(structure) for structure in STRUCTURES.values()]
    places = {
        "offsetof(struct kvm_vcpu_events, flags)": abi.KvmVcpuEvents.flags.offset,
        "offsetof(struct kvm_clock_data, host_tsc)": abi.KvmClockData.host_tsc.offset,
        "offsetof(struct kvm_irqchip, chip)": abi.KvmIrqchip.state.offset,
        "sizeof(struct kvm_xsave)": abi.XSAVE_BYTES,
        "sizeof(struct kvm_dirty_gfn)": dirty_gfns.KVM_DIRTY_GFN_BYTES,
        "offsetof(struct kvm_dirty_gfn, slot)": 4,
        "offsetof(struct kvm_dirty_gfn, offset)": 8,
        "KVM_DIRTY_GFN_F_DIRTY": dirty_gfns.KVM_DIRTY_GFN_F_DIRTY,
        "KVM_DIRTY_GFN_F_RESET": dirty_gfns.KVM_DIRTY_GFN_F_RESET,
        "KVM_DIRTY_LOG_PAGE_OFFSET": abi.KVM_DIRTY_LOG_PAGE_OFFSET,
    }
    assert told_by_c(tmp_path, list(places)) == list(places.values())
