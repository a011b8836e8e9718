"""What saving and restoring must know of this host's KVM, asked once a process."""

from __future__ import annotations

from functools import cache

import attrs

from asyncvmm.machine.kvm.abi import MAX_MSR_INDICES, XSAVE_BYTES, Capability, KvmMsrList, Request
from asyncvmm.machine.kvm.fds import check_extension, ioctl
from asyncvmm.machine.kvm.state.task_register import is_tcg
from asyncvmm.machine.kvm.system import KvmSystem, host_cpuid
from asyncvmm.x86.cpuid import CpuidEntry


@attrs.frozen(eq=False)
class HostState:
    """cpuid: KVM_GET_SUPPORTED_CPUID. has_xcrs: its processor has XSAVE, and so vCPUs have extended control registers
    (CPUID does not tell: a KVM may support more than it lists). xsave_bytes: size of a vCPU's XSAVE area, which a
    processor without XSAVE has as well; xsave2: it is had by KVM_GET_XSAVE2. msrs: KVM_GET_MSR_INDEX_LIST.
    tsc_scaling: a vCPU's TSC can have a frequency of its own. is_tcg: its processor is emulated by QEMU.
    """

    cpuid: tuple[CpuidEntry, ...]
    has_xcrs: bool
    xsave_bytes: int
    xsave2: bool
    msrs: tuple[int, ...]
    tsc_scaling: bool
    max_vcpus: int
    is_tcg: bool = False


@cache
def host_state() -> HostState:
    """Ask. Raises KvmUnavailable, KvmIoctlError."""
    cpuid = host_cpuid().entries
    system = KvmSystem.open()
    try:
        listed = KvmMsrList(nmsrs=MAX_MSR_INDICES)
        ioctl(system.fd, Request.KVM_GET_MSR_INDEX_LIST, listed)
        xsave2 = check_extension(system.fd, Capability.KVM_CAP_XSAVE2)
        return HostState(
            cpuid=cpuid,
            has_xcrs=bool(check_extension(system.fd, Capability.KVM_CAP_XCRS)),
            xsave_bytes=max(XSAVE_BYTES, xsave2),
            xsave2=bool(xsave2),
            msrs=tuple(listed.indices[: listed.nmsrs]),
            tsc_scaling=bool(check_extension(system.fd, Capability.KVM_CAP_TSC_CONTROL)),
            max_vcpus=system.max_vcpus,
            is_tcg=is_tcg(),
        )
    finally:
        system.close()
