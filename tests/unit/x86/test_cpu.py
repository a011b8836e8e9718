from __future__ import annotations

from asyncvmm.x86.cpu import gdt, long_mode_cpu, pvh_cpu


def test_the_64_bit_entry_is_in_long_mode_with_the_zero_page_in_rsi() -> None:
    cpu = long_mode_cpu(0x100200)
    assert (cpu.rip, cpu.rsi, cpu.rsp, cpu.cr3) == (0x100200, 0x7000, 0x8FF0, 0x9000)
    assert cpu.cr0 & 0x80000001 == 0x80000001
    assert cpu.cr4 & 0x20
    assert cpu.efer == 0x500
    assert (cpu.cs.selector, cpu.cs.l, cpu.cs.db) == (0x10, 1, 0)
    assert {cpu.ds.selector, cpu.es.selector, cpu.ss.selector} == {0x18}
    assert cpu.rflags == 2


def test_the_pvh_entry_is_in_32_bit_protected_mode_with_start_info_in_ebx() -> None:
    cpu = pvh_cpu(0x1000000)
    assert (cpu.rip, cpu.rbx, cpu.cr3, cpu.cr4, cpu.efer) == (0x1000000, 0x6000, 0, 0, 0)
    assert cpu.cr0 & 0x80000001 == 1
    assert (cpu.cs.l, cpu.cs.db, cpu.cs.limit) == (0, 1, 0xFFFFFFFF)
    assert (cpu.tr.base, cpu.tr.limit, cpu.tr.type) == (0, 0x67, 0xB)


def test_the_gdt_holds_the_flat_descriptors_of_the_manual() -> None:
    empty = bytes(16)
    data = (0x00CF93000000FFFF).to_bytes(8, "little")
    assert gdt(long_mode_cpu(0)) == empty + (0x00AF9B000000FFFF).to_bytes(8, "little") + data
    assert gdt(pvh_cpu(0)) == empty + (0x00CF9B000000FFFF).to_bytes(8, "little") + data
    assert long_mode_cpu(0).gdt.limit == len(gdt(long_mode_cpu(0))) - 1


def test_the_gdt_ends_where_the_idt_begins() -> None:
    cpu = long_mode_cpu(0)
    assert cpu.gdt.base + cpu.gdt.limit + 1 <= cpu.idt.base
