"""One KVM VM as the kernel holds it: VM descriptor, memory, interrupt controllers, vCPUs with their first state.

Synchronous and blocking: KVM_CREATE_VM and its teardown take from a fraction of a millisecond to tens of them, so the
machine calls this on a worker thread. What is created here is freed in reverse by ``close``, also half-way.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from asyncvmm.errors import AsyncVMMError, InitrdError, MemorySizeError
from asyncvmm.machine.kvm.abi import KvmIrqLevel, Request
from asyncvmm.machine.kvm.contents import READ_INITRD, Contents
from asyncvmm.machine.kvm.creation import Blueprint, Creation, GuestCpuid, expect_tsc_khz, set_cpuid
from asyncvmm.machine.kvm.fastpath.chain import Chain, Failure, Made
from asyncvmm.machine.kvm.fds import raw_ioctl_short
from asyncvmm.machine.kvm.mapped import mapped_view
from asyncvmm.machine.kvm.memory import MAP_MEMORY, GuestMemory
from asyncvmm.machine.kvm.registers import set_msrs_behind
from asyncvmm.machine.kvm.system import refusal
from asyncvmm.machine.kvm.vcpu import Vcpu
from asyncvmm.timing.timeline import Span, Timeline
from asyncvmm.x86.layout import MMIO_SIZE
from asyncvmm.x86.msrs import boot_msrs

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.dirty_gfns import DirtyGfns
    from asyncvmm.machine.kvm.discard import Backing

_IRQ_LINE = int(Request.KVM_IRQ_LINE)
_MSRS = boot_msrs()


class KvmVm:
    """A VM with memory and vCPUs, filled and ready to run."""

    def __init__(self, plan: Blueprint, timeline: Timeline) -> None:
        """Create it as its blueprint says, recording the phases on ``timeline``.

        Raises KvmUnavailable, KvmIoctlError, MemorySizeError, VcpuCountError, InitrdError.
        """
        steps = plan.steps
        made = steps.program.run(*plan.given)
        timeline.record_later(made.spans)
        try:
            if made.failure is not None:
                raise creation_error(made.failure, len(steps.vcpus))
            begin = timeline.clock()
            self._take(steps, made, "anonymous")
            if plan.contents is not None:
                self._finish(plan, plan.contents)
            finish = Span("vm_finish", begin, timeline.clock())
            timeline.record_later(lambda: (finish,))
        except BaseException:
            made.undo()
            raise

    @classmethod
    def adopt(cls, steps: Creation, made: Made, backing: Backing) -> KvmVm:
        """The VM that a chain has made. ``backing``: what its memory is."""
        vm = cls.__new__(cls)
        vm._take(steps, made, backing)
        return vm

    def _take(self, steps: Creation, made: Made, backing: Backing) -> None:
        """What the chain has made, as objects."""
        self._made = made
        self.fd = made[steps.vm]
        self.tsc_khz = made[steps.tsc_khz]
        self.memory = GuestMemory(steps.regions, made[steps.memory], backing)
        registers = made[steps.registers] if steps.registers is not None else 0
        self.registers = mapped_view(registers, steps.devices * MMIO_SIZE) if registers else memoryview(b"")
        run_size = made[steps.system.run_size]
        self.rings = _rings(steps, made) if steps.ring_bytes else ()
        self.vcpus = [Vcpu(index, made[at.fd], made[at.page], run_size) for index, at in enumerate(steps.vcpus)]

    def set_irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE: a microsecond, so the GIL is kept. Raises nothing: the GSI is ours and the VM is alive."""
        line = KvmIrqLevel(irq, level)
        raw_ioctl_short(self.fd, _IRQ_LINE, ctypes.addressof(line))

    def close(self) -> None:
        """Free everything. Every vCPU thread must have ended."""
        for vcpu in self.vcpus:
            vcpu.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()
        self.registers.release()
        self._made.undo()

    def _finish(self, plan: Blueprint, contents: Contents) -> None:
        """See to what a chain cannot decide: each of these is as the chain foresaw it but for rare cases."""
        if plan.cpuid is not None and plan.cpuid.tsc_khz != self.tsc_khz:
            self._correct_cpuid(GuestCpuid(plan.cpuid.host, self.tsc_khz))
        for vcpu, msrs_set in zip(self.vcpus, plan.steps.msrs_set, strict=True):
            if (done := self._made[msrs_set]) < len(_MSRS):
                set_msrs_behind(vcpu.fd, done, _MSRS)
        read = plan.steps.initrd_read
        if read is not None and (done := self._made[read]) < contents.initrd_size:
            self._read_on(contents, done)

    def _correct_cpuid(self, cpuid: GuestCpuid) -> None:
        chain = Chain(given=len(self.vcpus))
        set_cpuid(chain, [chain.given(vcpu.index) for vcpu in self.vcpus], cpuid)
        made = chain.program().run(*(vcpu.fd for vcpu in self.vcpus))
        if made.failure is not None:
            raise refusal(made.failure)
        expect_tsc_khz(self.tsc_khz)

    def _read_on(self, contents: Contents, done: int) -> None:
        """A read may end early; one at the file's end means that the file has shrunk."""
        size = contents.initrd_size
        try:
            read = self.memory.read_file(contents.initrd_address, contents.initrd_fd, size, done)
        except OSError as failure:
            raise _unreadable(failure.errno or 0) from None
        if read != size:
            raise InitrdError("initrd", expected=f"{size} bytes, as when it was opened", found=f"{read} bytes")


def _rings(steps: Creation, made: Made) -> tuple[DirtyGfns, ...]:
    from asyncvmm.machine.kvm.dirty_gfns import DirtyGfns

    sizes = [region.size for region in steps.regions]
    mapped = [made[vcpu.ring] for vcpu in steps.vcpus if vcpu.ring is not None]
    return tuple(DirtyGfns(mapped_view(address, steps.ring_bytes), sizes) for address in mapped)


def creation_error(failure: Failure, vcpus: int) -> AsyncVMMError:
    """What it means that a step of a VM's creation failed."""
    if failure.name == MAP_MEMORY:
        return MemorySizeError("guest memory", expected="a mapping of it", found=os.strerror(failure.errno))
    if failure.name == READ_INITRD:
        return _unreadable(failure.errno)
    return refusal(failure, vcpus=vcpus)


def _unreadable(number: int) -> InitrdError:
    return InitrdError("initrd", expected="a readable file", found=os.strerror(number))
