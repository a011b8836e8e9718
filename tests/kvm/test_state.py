"""What KVM tells of a vCPU and a VM is saved and set again whole, on hosts that are not quite alike as well."""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from asyncvmm.errors import SnapshotMismatch
from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.machine.kvm import creation, restore_chains, restoring
from asyncvmm.machine.kvm.abi import (
    KvmClockData,
    KvmDebugregs,
    KvmIrqLevel,
    KvmLapicState,
    KvmMpState,
    KvmMsrEntry,
    KvmMsrs,
    KvmRegs,
    KvmVcpuEvents,
    Request,
)
from asyncvmm.machine.kvm.creation import expect_tsc_khz
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.restoring import restore_blueprint
from asyncvmm.machine.kvm.state import setting
from asyncvmm.machine.kvm.state import vcpu as vcpu_state
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.vcpu import VcpuState, read_vcpu
from asyncvmm.machine.kvm.state.vm import VmState, read_vm
from asyncvmm.snapshot.codec import decode
from tests.support.held_vm import HeldVm, Saved, descriptors, restored, with_field

pytestmark = pytest.mark.requires("kvm")

LSTAR, KERNEL_GS_BASE, PAT, TSC_DEADLINE = 0xC0000082, 0xC0000102, 0x277, 0x6E0
MTRR_BASE_0, BNDCFGS, SYSENTER_EIP = 0x200, 0xD90, 0x176
MSRS = {
    LSTAR: 0xFFFFFFFF81000000,
    KERNEL_GS_BASE: 0x123456789000,
    PAT: 0x0007010600070406,
    MTRR_BASE_0: 0x80000006,
    SYSENTER_EIP: 0x1234,
}

Guest = Callable[[str], Path]


@pytest.fixture
def held(guest: Guest) -> Iterator[HeldVm]:
    """Two vCPUs, of which the second waits for its INIT, and neither has run."""
    vm = HeldVm.boot(guest("tally"), vcpus=2)
    yield vm
    vm.close()


@pytest.fixture
def saved(held: HeldVm) -> Iterator[Saved]:
    """What was saved of it."""
    saved = held.save()
    yield saved
    saved.close()


# -- there and back ----------------------------------------------------------------------------------------------------


def fill_vcpu(fd: int) -> None:
    """Give a vCPU a state that no new one has."""
    ioctl(fd, Request.KVM_SET_MP_STATE, KvmMpState(0))
    names = [name for name, *_ in KvmRegs._fields_ if name != "rflags"]
    ioctl(fd, Request.KVM_SET_REGS, KvmRegs(**{name: 0x1000 + at for at, name in enumerate(names)}, rflags=0x246))
    batch = KvmMsrs(nmsrs=len(MSRS))
    for slot, (index, value) in enumerate(MSRS.items()):
        batch.entries[slot] = KvmMsrEntry(index, 0, value)
    assert ioctl(fd, Request.KVM_SET_MSRS, batch) == len(MSRS)
    debug = KvmDebugregs()
    struct.pack_into("<6Q", debug, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0xFFFF0FF0, 0x402)
    ioctl(fd, Request.KVM_SET_DEBUGREGS, debug)
    lapic = KvmLapicState()
    ioctl(fd, Request.KVM_GET_LAPIC, lapic)
    struct.pack_into("<I", lapic, 0xF0, 0x1FF)
    struct.pack_into("<I", lapic, 0x80, 0x20)
    struct.pack_into("<I", lapic, 0x220, 1 << 9)
    ioctl(fd, Request.KVM_SET_LAPIC, lapic)
    events = KvmVcpuEvents()
    ioctl(fd, Request.KVM_GET_VCPU_EVENTS, events)
    struct.pack_into("<4B", events, 16, 1, 0, 0, 0)  # nmi.injected
    ioctl(fd, Request.KVM_SET_VCPU_EVENTS, events)


PIT_CHANNEL_BYTES = 24
CLOCKS = ("tsc", "tsc_offset", "tsc_deadline")
"""Fields that go on while one looks, and what makes the TSC go on from where it stood."""


def lasting(state: VcpuState) -> dict[str, Any]:
    return {name: value for name, value in attrs.asdict(state).items() if name not in CLOCKS}


def test_every_part_of_a_vcpu_comes_back(held: HeldVm) -> None:
    for vcpu in held.vm.vcpus:
        fill_vcpu(vcpu.fd)
    before = [read_vcpu(vcpu.fd, host_state()) for vcpu in held.vm.vcpus]
    saved = held.save()
    vm = restored(saved.plan)
    try:
        for vcpu, was in zip(vm.vcpus, before, strict=True):
            state = read_vcpu(vcpu.fd, host_state())
            assert lasting(state) == lasting(was)
            assert MSRS.items() <= dict(state.msr_values()).items()
            assert state.tsc >= was.tsc
    finally:
        vm.close()
        saved.close()


def test_every_part_of_a_vm_comes_back_and_its_clock_goes_on(held: HeldVm) -> None:
    ioctl(held.vm.fd, Request.KVM_SET_CLOCK, KvmClockData(clock=10**15))
    ioctl(held.vm.fd, Request.KVM_IRQ_LINE, KvmIrqLevel(6, 1))
    before = read_vm(held.vm.fd)
    saved = held.save()
    vm = restored(saved.plan)
    try:
        state = read_vm(vm.fd)
        assert (state.pic_master, state.pic_slave, state.ioapic) == (before.pic_master, before.pic_slave, before.ioapic)
        assert before.clock <= state.clock < before.clock + 60 * 10**9
        for channel in range(0, 72, PIT_CHANNEL_BYTES):  # when they were loaded is this host's affair
            assert state.pit[channel : channel + 16] == before.pit[channel : channel + 16]
    finally:
        vm.close()
        saved.close()


def test_what_was_restored_is_saved_again_the_same(held: HeldVm, saved: Saved) -> None:
    first = HeldVm.restore(saved)
    again = first.save()
    second = HeldVm.restore(again, from_shell=True)
    try:
        states = [[read_vcpu(vcpu.fd, host_state()) for vcpu in each.vm.vcpus] for each in (held, first, second)]
        assert [lasting(state) for state in states[0]] == [lasting(state) for state in states[1]]
        assert [lasting(state) for state in states[1]] == [lasting(state) for state in states[2]]
        assert decode(again.plan.saved.sections["board"]) == decode(saved.plan.saved.sections["board"])
    finally:
        for vm in (first, second):
            vm.close()
        again.close()


def test_the_tscs_of_all_vcpus_agree_and_never_go_back(saved: Saved) -> None:
    was = VcpuState.of("vcpu0", saved.plan.saved.sections["vcpu0"])
    vm = restored(saved.plan)
    try:
        one, other = (read_vcpu(vcpu.fd, host_state()) for vcpu in vm.vcpus)
        assert was.tsc <= one.tsc <= other.tsc
        assert one.tsc_offset == other.tsc_offset
    finally:
        vm.close()


def _signed(value: int) -> int:
    """Of a difference modulo 2^64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def test_the_time_between_save_and_restore_has_not_passed_for_the_tsc(saved: Saved) -> None:
    was = VcpuState.of("vcpu0", saved.plan.saved.sections["vcpu0"])
    time.sleep(0.1)
    before = clock_sample()
    vm = restored(saved.plan)
    try:
        now = read_vcpu(vm.vcpus[0].fd, host_state())
        after = clock_sample()
        assert before is not None
        assert after is not None
        if now.tsc_offset != was.tsc_offset:  # a KVM without hardware's help adds nothing to the host's TSC
            saving = VmState.of(saved.plan.saved.sections["vm"]).host_tsc
            assert saving is not None
            assert now.tsc - was.tsc <= after.tsc_end - before.tsc + abs(
                _signed(saving + (was.tsc_offset or 0) - was.tsc)
            )
    finally:
        vm.close()


def test_the_xsave_area_is_saved_whole_with_the_control_registers_where_there_are_any(saved: Saved) -> None:
    for index in range(2):
        state = VcpuState.of("vcpu", saved.plan.saved.sections[f"vcpu{index}"])
        assert len(state.xsave) == host_state().xsave_bytes
        assert (state.xcrs is not None) == host_state().has_xcrs


@pytest.mark.parametrize("without", ["KVM_GET_XSAVE2", "XSAVE"])
def test_hosts_that_have_less_of_it_save_a_guests_fpu_as_well(
    without: str, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_xcrs = host_state().has_xcrs and without != "XSAVE"
    host = attrs.evolve(host_state(), xsave2=False, has_xcrs=has_xcrs)
    for module in (restoring, vcpu_state):
        monkeypatch.setattr(module, "host_state", lambda: host)
    vm = HeldVm.boot(guest("tally"))
    vm.run()
    vm.until(lambda: len(vm.output) > 5)
    vm.hold()
    saved = vm.save()
    vm.close()
    vm = HeldVm.restore(saved)
    try:
        vm.run()
        goal = len(vm.take()) + 5
        vm.until(lambda: len(vm.output) > goal)
        assert not vm.ends
    finally:
        vm.close()
        saved.close()


@pytest.mark.requires("xsave")
def test_a_processor_without_xsave_does_not_run_what_has_it(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    without = attrs.evolve(host_state(), has_xcrs=False)
    monkeypatch.setattr(restoring, "host_state", lambda: without)
    restoring._state.cache_clear()
    with pytest.raises(SnapshotMismatch, match="XSAVE"):
        restore_blueprint(saved.plan)


# -- hosts that are not alike ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains are written down anew, and what was learned of this host is forgotten again."""

    def forget() -> None:
        restore_chains.restoration.cache_clear()
        restore_chains.filling.cache_clear()
        restoring._Host.takes_offsets = True

    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("from_shell", [False, True])
def test_a_host_without_tsc_offsets_is_learned_of_and_has_the_register_set(
    saved: Saved, from_shell: bool, fresh_chains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "KVM_VCPU_TSC_OFFSET", 99)
    HeldVm.restore(saved, from_shell=from_shell).close()
    assert not restoring._Host.takes_offsets
    held = HeldVm.restore(saved, from_shell=from_shell)
    try:
        one, other = (read_vcpu(vcpu.fd, host_state()) for vcpu in held.vm.vcpus)
        assert one.tsc_offset == other.tsc_offset
    finally:
        held.close()


def test_another_tsc_frequency_is_refused_before_and_after_this_hosts_is_known(
    saved: Saved, fresh_chains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = with_field(saved.plan, "vcpu0", "tsc_khz", 1_000_000)
    plan = attrs.evolve(plan, saved=attrs.evolve(plan.saved, cpu={**plan.saved.cpu, "tsc_khz": None}))
    before = descriptors()
    monkeypatch.setattr(creation, "_seen_tsc_khz", None)
    for _ in range(2):
        with pytest.raises(SnapshotMismatch, match="TSC frequency"):
            restored(plan)
    assert descriptors() == before


def test_a_host_that_scales_tscs_is_asked_to(saved: Saved, fresh_chains: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's KVM cannot, and refuses: by the error one sees that it was asked."""
    plan = with_field(saved.plan, "vcpu0", "tsc_khz", 1_000_000)
    scaling = attrs.evolve(host_state(), tsc_scaling=True)
    monkeypatch.setattr(restoring, "host_state", lambda: scaling)
    if host_state().tsc_scaling:
        restored(plan).close()
    else:
        with suppress(SnapshotMismatch):
            restored(plan).close()
    assert restoring._tsc_plan(restoring.saved_state(plan.saved)).khz == 1_000_000


def test_missing_cpu_features_are_named_before_a_vm_is_made(saved: Saved) -> None:
    cpu = dict(saved.plan.saved.cpu)
    cpu["features"] = {**cpu["features"], "0x7.0.edx": 1 << 24}
    plan = attrs.evolve(saved.plan, saved=attrs.evolve(saved.plan.saved, cpu=cpu))
    with pytest.raises(SnapshotMismatch, match="amx_tile"):
        restore_blueprint(plan)


def test_a_register_that_this_kvm_does_not_take_is_named(saved: Saved) -> None:
    plan = with_field(
        saved.plan, "vcpu1", "msrs", struct.pack("<IIQ", LSTAR, 0, 0) + struct.pack("<IIQ", BNDCFGS, 0, 0xDEAD)
    )
    with pytest.raises(SnapshotMismatch, match="MSR 0xd90 of vCPU 1: expected a KVM that takes 0xdead"):
        restored(plan)


def test_the_vms_section_is_kvms_structures(held: HeldVm) -> None:
    state = read_vm(held.vm.fd)
    assert VmState.of(state.encode()) == state
    chips = [struct.unpack_from("<I", chip)[0] for chip in state.irqchips()]
    assert chips == [0, 1, 2]
    assert all(len(chip) == ctypes.sizeof(ctypes.c_uint32) * 2 + 512 for chip in state.irqchips())


def test_the_frequency_of_the_first_vm_is_remembered(saved: Saved) -> None:
    vm = restored(saved.plan)
    try:
        assert creation.seen_tsc_khz() == vm.tsc_khz
    finally:
        vm.close()
        expect_tsc_khz(vm.tsc_khz)
