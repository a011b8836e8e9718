"""What Python decides about a VM, written down for the C floors: registers, MSRs, CPUID and memory contents.

So both sides make the same VM, and the floor's time is the kernel's share of ours.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from asyncvmm.machine.kvm.abi import KvmRegs, KvmSregs, Request
from asyncvmm.machine.kvm.contents import Contents
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.system import KvmSystem, supported_cpuid
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.cpuid import CpuidEntry, vcpu_cpuid
from asyncvmm.x86.load import BootLayout
from asyncvmm.x86.msrs import boot_msrs


def write_recipe(path: Path, layout: BootLayout, memory_bytes: int) -> Path:
    """Write the recipe of a one-vCPU VM for the floors, and give its path back."""
    sregs, regs, tsc_khz = _boot_state(layout, memory_bytes)
    system = KvmSystem.open()
    try:
        cpuid = vcpu_cpuid(supported_cpuid(system.fd), vcpu=0, vcpus=1, tsc_khz=tsc_khz)
    finally:
        system.close()
    head = struct.pack("<4I", len(layout.segments), len(boot_msrs()), len(cpuid), 0)
    msrs = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in boot_msrs())
    path.write_bytes(head + bytes(sregs) + bytes(regs) + msrs + _cpuid(cpuid) + _segments(layout))
    return path


def _boot_state(layout: BootLayout, memory_bytes: int) -> tuple[KvmSregs, KvmRegs, int]:
    vm = KvmVm(blueprint(memory_bytes, 1, Contents(layout.cpu, layout.segments)), Timeline())
    try:
        sregs, regs = KvmSregs(), KvmRegs()
        ioctl(vm.vcpus[0].fd, Request.KVM_GET_SREGS, sregs)
        ioctl(vm.vcpus[0].fd, Request.KVM_GET_REGS, regs)
        return sregs, regs, vm.tsc_khz
    finally:
        vm.close()


def _cpuid(entries: Sequence[CpuidEntry]) -> bytes:
    return b"".join(
        struct.pack("<7I12x", entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)
        for entry in entries
    )


def _segments(layout: BootLayout) -> bytes:
    return b"".join(
        struct.pack("<QQ", segment.address, len(segment.data)) + bytes(segment.data) for segment in layout.segments
    )
