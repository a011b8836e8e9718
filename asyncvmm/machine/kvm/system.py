"""What one open /dev/kvm says about the host: limits, and the CPUID entries it can show a guest."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import attrs

from asyncvmm.errors import KvmUnavailable
from asyncvmm.machine.kvm.abi import (
    MAX_CPUID_ENTRIES,
    Capability,
    KvmCpuid2,
    KvmCpuidEntry2,
    Request,
)
from asyncvmm.machine.kvm.fds import DEV_KVM, check_extension, ioctl, open_kvm
from asyncvmm.x86.cpuid import CpuidEntry, vcpu_cpuid

NEEDED = (Capability.KVM_CAP_IRQCHIP, Capability.KVM_CAP_USER_MEMORY, Capability.KVM_CAP_IMMEDIATE_EXIT)


@attrs.frozen
class KvmSystem:
    """An open /dev/kvm: its descriptor, the size of a kvm_run page, and the most vCPUs a VM can have."""

    fd: int
    run_size: int
    max_vcpus: int

    @classmethod
    def open(cls, path: Path = DEV_KVM) -> KvmSystem:
        """Open /dev/kvm and check what every VM needs. Raises KvmUnavailable."""
        fd = open_kvm(path)
        try:
            for capability in NEEDED:
                if not check_extension(fd, capability):
                    raise KvmUnavailable("KVM", expected=capability.name, found="a kernel without it")
            run_size = ioctl(fd, Request.KVM_GET_VCPU_MMAP_SIZE)
            most = check_extension(fd, Capability.KVM_CAP_MAX_VCPUS) or check_extension(fd, Capability.KVM_CAP_NR_VCPUS)
            return cls(fd, run_size, max(most, 1))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close /dev/kvm; VMs made from it live on."""
        os.close(self.fd)


MOST_KEPT_TABLES = 256
"""CPUID tables kept for coming VMs, 10 KiB each."""


@attrs.frozen(eq=False)
class HostCpuid:
    """What KVM_GET_SUPPORTED_CPUID said once: it is the same for as long as this process lives."""

    entries: tuple[CpuidEntry, ...]


_host_cpuid: HostCpuid | None = None


def guest_cpuid(kvm_fd: int, *, vcpu: int, vcpus: int, tsc_khz: int) -> KvmCpuid2:
    """What KVM_SET_CPUID2 takes for one vCPU; to be read only, for VMs share it. Raises KvmIoctlError.

    Asking KVM and making the tables takes 0.7 ms, which only the first VM of a process pays.
    """
    global _host_cpuid
    if _host_cpuid is None:
        _host_cpuid = HostCpuid(supported_cpuid(kvm_fd))
    return _guest_table(_host_cpuid, vcpu, vcpus, tsc_khz)


@lru_cache(MOST_KEPT_TABLES)
def _guest_table(host: HostCpuid, vcpu: int, vcpus: int, tsc_khz: int) -> KvmCpuid2:
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
