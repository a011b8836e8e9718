"""The boot vCPU's registers at the kernel's entry, as plain records, and the descriptors they come from.

Facts: Linux boot.rst (64-bit protocol: __BOOT_CS 0x10, __BOOT_DS 0x18, flat; identity-mapped pages), Xen's PVH ABI
(32-bit protected mode, paging off, EBX = start_info), Intel SDM volume 3, 2.5 and 3.4.5.
"""

from __future__ import annotations

import struct

import attrs

from asyncvmm.x86.layout import BOOT_STACK, GDT_ADDRESS, IDT_ADDRESS, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_FIXED = 1 << 1

TYPE_CODE = 0xB
"""Execute, read, accessed."""
TYPE_DATA = 0x3
"""Read, write, accessed."""
TYPE_TSS_BUSY = 0xB
TYPE_LDT = 0x2

BOOT_CS = 0x10
BOOT_DS = 0x18


@attrs.frozen(kw_only=True)
class SegmentRegister:
    """A segment register with its hidden part. ``limit`` is in bytes (its last valid offset), whatever ``g`` says;
    ``s`` is 0 for system segments; ``unusable`` is KVM's and VMX's name for a null selector loaded."""

    base: int = 0
    limit: int = 0xFFFFFFFF
    selector: int = 0
    type: int = 0
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741  (the SDM's name)
    g: int = 1
    avl: int = 0
    unusable: int = 0

    def descriptor(self) -> bytes:
        """The 8 bytes that stand for it in a GDT (SDM volume 3, figure 3-8)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        base = self.base
        return struct.pack(
            "<HHBBBB",
            limit & 0xFFFF,
            base & 0xFFFF,
            base >> 16 & 0xFF,
            access,
            limit >> 16 & 0xF | flags << 4,
            base >> 24 & 0xFF,
        )


@attrs.frozen
class DescriptorTable:
    """GDTR or IDTR: linear base and limit."""

    base: int
    limit: int


@attrs.frozen(kw_only=True)
class BootCpu:
    """What the boot vCPU starts with. General registers that are not named here are 0.

    The other vCPUs start in the wait-for-SIPI state and need none of this.
    """

    rip: int
    rsp: int = 0
    rsi: int = 0
    rbx: int = 0
    rflags: int = RFLAGS_FIXED
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    cs: SegmentRegister
    ds: SegmentRegister
    es: SegmentRegister
    fs: SegmentRegister
    gs: SegmentRegister
    ss: SegmentRegister
    tr: SegmentRegister
    ldt: SegmentRegister
    gdt: DescriptorTable
    idt: DescriptorTable


def long_mode_cpu(entry: int) -> BootCpu:
    """64-bit boot protocol: long mode, page tables at PAGE_TABLES, RSI = the zero page."""
    return attrs.evolve(
        _protected_mode_cpu(entry),
        rsi=ZERO_PAGE,
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=PAGE_TABLES,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
        cs=SegmentRegister(selector=BOOT_CS, type=TYPE_CODE, l=1),
    )


def pvh_cpu(entry: int) -> BootCpu:
    """PVH: 32-bit protected mode without paging, EBX = start_info."""
    return attrs.evolve(_protected_mode_cpu(entry), rbx=PVH_START_INFO)


def gdt(cpu: BootCpu) -> bytes:
    """The GDT for these registers: two empty entries, then code at BOOT_CS and data at BOOT_DS."""
    return bytes(BOOT_CS) + cpu.cs.descriptor() + cpu.ds.descriptor()


def _protected_mode_cpu(entry: int) -> BootCpu:
    data = SegmentRegister(selector=BOOT_DS, type=TYPE_DATA, db=1)
    return BootCpu(
        rip=entry,
        rsp=BOOT_STACK,
        cr0=CR0_PE | CR0_ET,
        cs=SegmentRegister(selector=BOOT_CS, type=TYPE_CODE, db=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=SegmentRegister(limit=0x67, type=TYPE_TSS_BUSY, s=0, g=0),
        ldt=SegmentRegister(limit=0, type=TYPE_LDT, present=0, s=0, g=0, unusable=1),
        gdt=DescriptorTable(GDT_ADDRESS, BOOT_DS + 7),
        # No room for a gate: nothing may interrupt before the kernel loads its own IDT.
        idt=DescriptorTable(IDT_ADDRESS, 0),
    )
