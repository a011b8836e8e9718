"""A vCPU's first registers, through KVM's structures: as steps of a chain.

Facts: KVM_SET_SREGS, KVM_SET_REGS, KVM_SET_LAPIC and KVM_SET_MSRS in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from asyncvmm.machine.kvm.abi import (
    KvmDtable,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrs,
    KvmRegs,
    KvmSegment,
    KvmSregs,
    Request,
)
from asyncvmm.machine.kvm.fastpath.chain import At, Chain
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.x86.cpu import BootCpu, DescriptorTable, SegmentRegister
from asyncvmm.x86.msrs import boot_msrs

_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVERY_EXTINT, _DELIVERY_NMI = 0x700, 0x400
_LINT_MODES = {_LVT_LINT0: _DELIVERY_EXTINT, _LVT_LINT1: _DELIVERY_NMI}


def set_lint_pins(chain: Chain, vcpus: Sequence[At]) -> None:
    """LINT0 takes the PIC's interrupts, LINT1 the NMI, as firmware leaves them (MP specification 1.4, 3.6.2.2)."""
    lapic = chain.data(KvmLapicState())
    modes = [(register, chain.data(mode.to_bytes(4, "little"))) for register, mode in _LINT_MODES.items()]
    for vcpu in vcpus:
        chain.ioctl(Request.KVM_GET_LAPIC, vcpu, lapic)
        for register, mode in modes:
            chain.copy(lapic + register, mode, 4)
        chain.ioctl(Request.KVM_SET_LAPIC, vcpu, lapic)


def set_boot_msrs(chain: Chain, vcpu: At) -> At:
    """KVM_SET_MSRS with boot_msrs(). Its result is how many were set: see ``set_msrs_behind``."""
    return chain.ioctl(Request.KVM_SET_MSRS, vcpu, chain.shared(_msr_batch(boot_msrs())))


def set_msrs_behind(fd: int, done: int, msrs: tuple[tuple[int, int], ...]) -> None:
    """Go on behind each MSR that a host does not know: KVM stopped there, ``done`` being set. Raises KvmIoctlError."""
    while done < len(msrs):
        msrs = msrs[done + 1 :]
        done = ioctl(fd, Request.KVM_SET_MSRS, _msr_batch(msrs)) if msrs else 0


@lru_cache(maxsize=16)
def _msr_batch(msrs: tuple[tuple[int, int], ...]) -> KvmMsrs:
    """What KVM_SET_MSRS takes; it only reads it, and every vCPU is given the same."""
    batch = KvmMsrs(nmsrs=len(msrs))
    for slot, (index, value) in enumerate(msrs):
        batch.entries[slot] = KvmMsrEntry(index, 0, value)
    return batch


def _segment(register: SegmentRegister) -> KvmSegment:
    return KvmSegment(
        base=register.base,
        limit=register.limit,
        selector=register.selector,
        type=register.type,
        present=register.present,
        dpl=register.dpl,
        db=register.db,
        s=register.s,
        l=register.l,
        g=register.g,
        avl=register.avl,
        unusable=register.unusable,
    )


def _table(table: DescriptorTable) -> KvmDtable:
    return KvmDtable(base=table.base, limit=table.limit)


def set_boot_state(chain: Chain, vcpu: At, boot: BootCpu) -> None:
    """KVM_SET_SREGS and KVM_SET_REGS: the state in which the vCPU starts. APIC base and CR8 stay KVM's."""
    sregs, regs = _boot_structures(boot)
    current, wanted = chain.data(KvmSregs()), chain.data(sregs)
    chain.ioctl(Request.KVM_GET_SREGS, vcpu, current)
    for field in (KvmSregs.apic_base, KvmSregs.cr8):
        chain.copy(wanted + field.offset, current + field.offset, field.size)
    chain.ioctl(Request.KVM_SET_SREGS, vcpu, wanted)
    chain.ioctl(Request.KVM_SET_REGS, vcpu, chain.shared(regs))


def _boot_structures(boot: BootCpu) -> tuple[KvmSregs, KvmRegs]:
    sregs = KvmSregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        setattr(sregs, name, _segment(getattr(boot, name)))
    sregs.gdt, sregs.idt = _table(boot.gdt), _table(boot.idt)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = boot.cr0, boot.cr3, boot.cr4, boot.efer
    regs = KvmRegs(rip=boot.rip, rsp=boot.rsp, rbp=boot.rsp, rsi=boot.rsi, rbx=boot.rbx, rflags=boot.rflags)
    return sregs, regs
