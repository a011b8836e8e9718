from __future__ import annotations

import struct

import attrs
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.state.arena import Arena
from asyncvmm.machine.kvm.state.vcpu import VcpuState
from asyncvmm.machine.kvm.state.vm import VmState

PAT, LSTAR, TSC, DEADLINE = 0x277, 0xC0000082, 0x10, 0x6E0
VCPU = VcpuState(
    mp_state=3,
    regs=b"r" * 144,
    sregs=b"s" * 312,
    xsave=b"x" * 4096,
    xcrs=b"c" * 392,
    debugregs=b"d" * 128,
    lapic=b"l" * 1024,
    tsc_khz=2_000_000,
    cpuid=b"i" * 80,
    msrs=struct.pack("<IIQIIQ", PAT, 0, 7, LSTAR, 0, 8),
    tsc=99,
    tsc_offset=None,
    tsc_deadline=77,
    events=b"e" * 64,
)
VM = VmState(pic_master=b"m" * 512, pic_slave=b"v" * 512, ioapic=b"o" * 512, pit=b"p" * 112, clock=5, host_tsc=None)


def test_every_structure_is_where_its_place_says() -> None:
    arena = Arena()
    places = arena.add_vcpu(VCPU, 4096)
    content = arena.content()
    for name in ("regs", "sregs", "xsave", "xcrs", "debugregs", "lapic", "events"):
        at, saved = getattr(places, name), getattr(VCPU, name)
        assert content[at : at + len(saved)] == saved
    assert content[places.mp_state : places.mp_state + 4] == b"\3\0\0\0"
    assert content[places.cpuid : places.cpuid + 88] == struct.pack("<II", 2, 0) + VCPU.cpuid


def test_registers_come_behind_their_number_the_clocks_apart() -> None:
    arena = Arena()
    places = arena.add_vcpu(VCPU, 4096)
    content = arena.content()
    assert places.deadline is not None
    for batch, msrs in (
        (places.tsc, [(TSC, 99)]),
        (places.msrs, [(PAT, 7), (LSTAR, 8)]),
        (places.deadline, [(DEADLINE, 77)]),
    ):
        assert batch.count == len(msrs)
        entries = content[batch.at + 8 : batch.at + 8 + 16 * batch.count]
        assert int.from_bytes(content[batch.at : batch.at + 8], "little") == len(msrs)
        assert [(index, value) for index, _, value in struct.iter_unpack("<IIQ", entries)] == msrs


def test_what_a_vcpu_has_not_has_no_place() -> None:
    places = Arena().add_vcpu(attrs.evolve(VCPU, xcrs=None, tsc_deadline=None), 4096)
    assert places.xcrs is None
    assert places.deadline is None


@given(st.integers(4096, 20_000))
def test_an_xsave_area_is_as_long_as_the_hosts_kvm_reads(size: int) -> None:
    arena = Arena()
    places = arena.add_vcpu(VCPU, size)
    after = arena.add_vm(VM)
    content = arena.content()
    assert content[places.xsave : places.xsave + size] == VCPU.xsave.ljust(size, b"\0")
    assert len(content) >= after.irqchips[-1] + 520


def test_the_vms_chips_are_numbered_and_its_clock_has_no_flags() -> None:
    arena = Arena()
    places = arena.add_vm(VM)
    content = arena.content()
    for number, (at, saved) in enumerate(zip(places.irqchips, (VM.pic_master, VM.pic_slave, VM.ioapic), strict=True)):
        assert content[at : at + 520] == struct.pack("<II", number, 0) + saved
    assert content[places.clock : places.clock + 48] == struct.pack("<Q40x", 5)
    assert content[places.pit : places.pit + 112] == VM.pit
