"""What one open /dev/kvm says about the host: limits, and the CPUID entries it can show a guest."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from pathlib import Path

import attrs

from asyncvmm.errors import HostError, KvmIoctlError, KvmUnavailable, VcpuCountError
from asyncvmm.machine.kvm.abi import (
    KVM_API_VERSION,
    MAX_CPUID_ENTRIES,
    Capability,
    KvmCpuid2,
    KvmCpuidEntry2,
    Request,
)
from asyncvmm.machine.kvm.fastpath.chain import At, Chain, Failure
from asyncvmm.machine.kvm.fds import DEV_KVM, ioctl, open_refused
from asyncvmm.x86.cpuid import CpuidEntry, vcpu_cpuid

NEEDED = (Capability.KVM_CAP_IRQCHIP, Capability.KVM_CAP_USER_MEMORY, Capability.KVM_CAP_IMMEDIATE_EXIT)

_OPEN = "open"


@attrs.frozen
class SystemSteps:
    """Where a chain's steps leave what KvmSystem has."""

    fd: At
    run_size: At
    max_vcpus: At


def open_system(chain: Chain, path: Path = DEV_KVM, vcpus: int = 1) -> SystemSteps:
    """Append the steps that open /dev/kvm and check what a VM of so many vCPUs needs."""
    fd = chain.open(_OPEN, path)
    chain.ioctl(Request.KVM_GET_API_VERSION, fd, least=KVM_API_VERSION)
    for capability in NEEDED:
        chain.ioctl(Request.KVM_CHECK_EXTENSION, fd, capability, least=1, name=capability.name)
    run_size = chain.ioctl(Request.KVM_GET_VCPU_MMAP_SIZE, fd)
    most = Capability.KVM_CAP_MAX_VCPUS
    return SystemSteps(fd, run_size, chain.ioctl(Request.KVM_CHECK_EXTENSION, fd, most, least=vcpus, name=most.name))


def refusal(failure: Failure, path: Path = DEV_KVM, vcpus: int = 1) -> HostError | VcpuCountError:
    """The error of a chain that failed, at one of ``open_system``'s steps or a later ioctl."""
    if failure.name == _OPEN:
        return open_refused(path, failure.errno)
    if failure.name == Request.KVM_GET_API_VERSION.name:
        version = f"{failure.result}" if failure.result >= 0 else os.strerror(failure.errno)
        return KvmUnavailable("KVM", expected=f"a KVM device of API version {KVM_API_VERSION}", found=version)
    if failure.name == Capability.KVM_CAP_MAX_VCPUS.name:
        expected = f"at most {max(failure.result, 0)} (this host's KVM)"
        return VcpuCountError("vCPUs", expected=expected, found=vcpus)
    if failure.name in Capability.__members__:
        return KvmUnavailable("KVM", expected=failure.name, found="a kernel without it")
    return KvmIoctlError(failure.name, failure.errno, os.strerror(failure.errno))


@attrs.frozen
class KvmSystem:
    """An open /dev/kvm: its descriptor, the size of a kvm_run page, and the most vCPUs a VM can have."""

    fd: int
    run_size: int
    max_vcpus: int

    @classmethod
    def open(cls, path: Path = DEV_KVM) -> KvmSystem:
        """Open /dev/kvm and check what every VM needs. Raises KvmUnavailable."""
        chain = Chain()
        steps = open_system(chain, path)
        made = chain.program().run()
        if made.failure is not None:
            made.undo()
            raise refusal(made.failure, path)
        return cls(made[steps.fd], made[steps.run_size], made[steps.max_vcpus])

    def close(self) -> None:
        """Close /dev/kvm; VMs made from it live on."""
        os.close(self.fd)


MOST_KEPT_TABLES = 256
"""CPUID tables kept for coming VMs, 10 KiB each."""


@attrs.frozen(eq=False)
class HostCpuid:
    """What KVM_GET_SUPPORTED_CPUID said once: it is the same for as long as this process lives."""

    entries: tuple[CpuidEntry, ...]


@cache
def host_cpuid() -> HostCpuid:
    """What KVM can show a guest. Asking takes half a millisecond, which only the first VM of a process pays.

    Raises KvmUnavailable, KvmIoctlError.
    """
    system = KvmSystem.open()
    try:
        return HostCpuid(supported_cpuid(system.fd))
    finally:
        system.close()


def guest_cpuid(host: HostCpuid, *, vcpu: int, vcpus: int, tsc_khz: int | None) -> KvmCpuid2:
    """What KVM_SET_CPUID2 takes for one vCPU; to be read only, for VMs share it."""
    return _guest_table(host, vcpu, vcpus, tsc_khz)


@lru_cache(MOST_KEPT_TABLES)
def _guest_table(host: HostCpuid, vcpu: int, vcpus: int, tsc_khz: int | None) -> KvmCpuid2:
    return cpuid_table(vcpu_cpuid(host.entries, vcpu=vcpu, vcpus=vcpus, tsc_khz=tsc_khz))


def supported_cpuid(kvm_fd: int) -> tuple[CpuidEntry, ...]:
    """KVM_GET_SUPPORTED_CPUID. Raises KvmIoctlError."""
    table = KvmCpuid2(nent=MAX_CPUID_ENTRIES)
    ioctl(kvm_fd, Request.KVM_GET_SUPPORTED_CPUID, table)
    return tuple(
        CpuidEntry(entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)
        for entry in table.entries[: table.nent]
    )


def cpuid_table(entries: tuple[CpuidEntry, ...]) -> KvmCpuid2:
    """The structure that KVM_SET_CPUID2 takes."""
    table = KvmCpuid2(nent=len(entries))
    for slot, entry in enumerate(entries):
        table.entries[slot] = KvmCpuidEntry2(
            entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx
        )
    return table
