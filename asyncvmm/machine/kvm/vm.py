"""One KVM VM as the kernel holds it: VM descriptor, memory, interrupt controllers, vCPUs with their first state.

Synchronous and blocking: KVM_CREATE_VM and its teardown take from a fraction of a millisecond to tens of them, so the
machine calls this on a worker thread. What is created here is freed in reverse by ``close``, also half-way.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack

from asyncvmm.errors import VcpuCountError
from asyncvmm.machine.kvm.abi import KVM_PIT_SPEAKER_DUMMY, KvmIrqLevel, KvmPitConfig, Request
from asyncvmm.machine.kvm.fds import ioctl, raw_ioctl_short
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.registers import set_boot_state, set_lint_pins, set_msrs
from asyncvmm.machine.kvm.system import KvmSystem, guest_cpuid
from asyncvmm.machine.kvm.vcpu import Vcpu
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.cpu import BootCpu
from asyncvmm.x86.layout import IDENTITY_MAP_ADDRESS, TSS_ADDRESS, ram_regions
from asyncvmm.x86.msrs import boot_msrs

_IRQ_LINE = int(Request.KVM_IRQ_LINE)


class KvmVm:
    """A VM with memory and vCPUs, not yet loaded with anything. Phases are recorded on ``timeline``."""

    def __init__(self, memory_bytes: int, vcpus: int, timeline: Timeline) -> None:
        """Create it all. Raises KvmUnavailable, KvmIoctlError, MemorySizeError, VcpuCountError."""
        self._timeline = timeline
        with ExitStack() as undo:
            with timeline.phase("kvm_open"):
                self.system = KvmSystem.open()
                undo.callback(self.system.close)
            _check_vcpus(vcpus, self.system)
            with timeline.phase("vm_create"):
                self.fd = ioctl(self.system.fd, Request.KVM_CREATE_VM)
                undo.callback(os.close, self.fd)
                self._reserve_addresses()
            # Before the interrupt controllers: creating those leaves the kernel waiting for readers of the VM's buses,
            # and a memslot that is registered then waits with it, for 4 to 8 ms.
            with timeline.phase("memory"):
                self.memory = self._create_memory(memory_bytes, undo)
            with timeline.phase("irqchip_create"):
                self._create_interrupt_controllers()
            with timeline.phase("vcpu_create"):
                self.vcpus = [self._create_vcpu(index, undo) for index in range(vcpus)]
            self._undo = undo.pop_all()

    def _reserve_addresses(self) -> None:
        ioctl(self.fd, Request.KVM_SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(IDENTITY_MAP_ADDRESS))
        ioctl(self.fd, Request.KVM_SET_TSS_ADDR, TSS_ADDRESS)

    def _create_interrupt_controllers(self) -> None:
        ioctl(self.fd, Request.KVM_CREATE_IRQCHIP)
        ioctl(self.fd, Request.KVM_CREATE_PIT2, KvmPitConfig(KVM_PIT_SPEAKER_DUMMY))

    def _create_memory(self, memory_bytes: int, undo: ExitStack) -> GuestMemory:
        with self._timeline.phase("memory_alloc"):
            memory = GuestMemory(ram_regions(memory_bytes))
            undo.callback(memory.close)
        with self._timeline.phase("memory_register"):
            memory.register(self.fd)
        return memory

    def _create_vcpu(self, index: int, undo: ExitStack) -> Vcpu:
        vcpu = Vcpu(self.fd, index, self.system.run_size)
        undo.callback(vcpu.close)
        return vcpu

    def configure(self, boot: BootCpu) -> None:
        """Give every vCPU its CPUID, and the first one the state in which the boot protocol enters the kernel.

        The others stay as KVM makes them: waiting for INIT and SIPI. Raises KvmIoctlError.
        """
        with self._timeline.phase("cpuid_config"):
            self.tsc_khz = tsc_khz = ioctl(self.vcpus[0].fd, Request.KVM_GET_TSC_KHZ)
            for vcpu in self.vcpus:
                table = guest_cpuid(self.system.fd, vcpu=vcpu.index, vcpus=len(self.vcpus), tsc_khz=tsc_khz)
                ioctl(vcpu.fd, Request.KVM_SET_CPUID2, table)
        with self._timeline.phase("register_config"):
            for vcpu in self.vcpus:
                set_lint_pins(vcpu.fd)
                set_msrs(vcpu.fd, boot_msrs())
            set_boot_state(self.vcpus[0].fd, boot)

    def set_irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE: a microsecond, so the GIL is kept. Raises nothing: the GSI is ours and the VM is alive."""
        line = KvmIrqLevel(irq, level)
        raw_ioctl_short(self.fd, _IRQ_LINE, ctypes.addressof(line))

    def close(self) -> None:
        """Free everything. Every vCPU thread must have ended."""
        self._undo.close()


def _check_vcpus(vcpus: int, system: KvmSystem) -> None:
    if vcpus > system.max_vcpus:
        raise VcpuCountError("vCPUs", expected=f"at most {system.max_vcpus} (this host's KVM)", found=vcpus)
