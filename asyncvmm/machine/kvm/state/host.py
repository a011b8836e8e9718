"""What saving and restoring must know of this host's KVM, asked once a process."""

from __future__ import annotations

from functools import cache

import attrs

from asyncvmm.machine.kvm.abi import XSAVE_BYTES, Capability, KvmMsrList, Request
from asyncvmm.machine.kvm.fds import check_extension, ioctl
from asyncvmm.machine.kvm.system import KvmSystem, host_cpuid
from asyncvmm.x86.cpuid import CpuidEntry


@attrs.frozen
class HostState:
    """cpuid: KVM_GET_SUPPORTED_CPUID. xsave_bytes: size of a vCPU's XSAVE area, 0 on a processor without XSAVE (which
    KVM_CAP_XCRS tells, not CPUID: a KVM may support more than it lists). xsave2: it is had by KVM_GET_XSAVE2.

    msrs: KVM_GET_MSR_INDEX_LIST. tsc_scaling: a vCPU's TSC can have a frequency of its own.
    """

    cpuid: tuple[CpuidEntry, ...]
    xsave_bytes: int
    xsave2: bool
    msrs: tuple[int, ...]
    tsc_scaling: bool


@cache
def host_state() -> HostState:
    """Ask. Raises KvmUnavailable, KvmIoctlError."""
    cpuid = host_cpuid().entries
    system = KvmSystem.open()
    try:
        has_xsave = bool(check_extension(system.fd, Capability.KVM_CAP_XCRS))
        xsave2 = check_extension(system.fd, Capability.KVM_CAP_XSAVE2)
        listed = KvmMsrList(nmsrs=len(KvmMsrList().indices))
        ioctl(system.fd, Request.KVM_GET_MSR_INDEX_LIST, listed)
        scaling = bool(check_extension(system.fd, Capability.KVM_CAP_TSC_CONTROL))
    finally:
        system.close()
    return HostState(
        cpuid=cpuid,
        xsave_bytes=max(XSAVE_BYTES, xsave2) if has_xsave else 0,
        xsave2=has_xsave and bool(xsave2),
        msrs=tuple(listed.indices[: listed.nmsrs]),
        tsc_scaling=scaling,
    )
