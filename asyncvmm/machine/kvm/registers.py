"""A vCPU's first registers, through KVM's structures. Structures that depend on a record alone are made once.

Facts: KVM_SET_SREGS, KVM_SET_REGS, KVM_SET_LAPIC and KVM_SET_MSRS in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from asyncvmm.machine.kvm.abi import (
    MAX_MSR_ENTRIES,
    KvmDtable,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrs,
    KvmRegs,
    KvmSegment,
    KvmSregs,
    Request,
)
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.x86.cpu import BootCpu, DescriptorTable, SegmentRegister

_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVERY_EXTINT, _DELIVERY_NMI = 0x700, 0x400


def set_lint_pins(fd: int) -> None:
    """LINT0 takes the PIC's interrupts, LINT1 the NMI, as firmware leaves them (MP specification 1.4, 3.6.2.2)."""
    lapic = KvmLapicState()
    ioctl(fd, Request.KVM_GET_LAPIC, lapic)
    for register, mode in ((_LVT_LINT0, _DELIVERY_EXTINT), (_LVT_LINT1, _DELIVERY_NMI)):
        ctypes.c_uint32.from_buffer(lapic, register).value = mode
    ioctl(fd, Request.KVM_SET_LAPIC, lapic)


def set_msrs(fd: int, msrs: tuple[tuple[int, int], ...]) -> None:
    """KVM_SET_MSRS, again behind each one that a host does not know: KVM stops there."""
    while msrs:
        batch = _msr_batch(msrs[:MAX_MSR_ENTRIES])
        done = ioctl(fd, Request.KVM_SET_MSRS, batch)
        msrs = msrs[done if done == batch.nmsrs else done + 1 :]


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


def set_boot_state(fd: int, boot: BootCpu) -> None:
    """KVM_SET_SREGS and KVM_SET_REGS: the state in which the vCPU starts. Raises KvmIoctlError."""
    current = KvmSregs()
    ioctl(fd, Request.KVM_GET_SREGS, current)
    sregs, regs = _boot_structures(boot)
    wanted = KvmSregs.from_buffer_copy(sregs)
    wanted.apic_base, wanted.cr8 = current.apic_base, current.cr8
    ioctl(fd, Request.KVM_SET_SREGS, wanted)
    ioctl(fd, Request.KVM_SET_REGS, regs)


@lru_cache(maxsize=16)
def _boot_structures(boot: BootCpu) -> tuple[KvmSregs, KvmRegs]:
    sregs = KvmSregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        setattr(sregs, name, _segment(getattr(boot, name)))
    sregs.gdt, sregs.idt = _table(boot.gdt), _table(boot.idt)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = boot.cr0, boot.cr3, boot.cr4, boot.efer
    regs = KvmRegs(rip=boot.rip, rsp=boot.rsp, rbp=boot.rsp, rsi=boot.rsi, rbx=boot.rbx, rflags=boot.rflags)
    return sregs, regs
