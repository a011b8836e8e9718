"""A VM is created in every shape, may fail anywhere, and is corrected where its host is not as foreseen."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from asyncvmm.errors import ConfigError, InitrdError, VcpuCountError
from asyncvmm.machine.kvm.abi import KvmCpuid2, KvmMsrEntry, KvmMsrs, KvmRegs, Request
from asyncvmm.machine.kvm.contents import Contents
from asyncvmm.machine.kvm.creation import blueprint, expect_tsc_khz
from asyncvmm.machine.kvm.fastpath import binding
from asyncvmm.machine.kvm.fastpath.chain import STEP, Executor, executor, interpret, native
from asyncvmm.machine.kvm.fds import ioctl, raw_ioctl
from asyncvmm.machine.kvm.registers import set_msrs_behind
from asyncvmm.machine.kvm.system import KvmSystem
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.cpu import long_mode_cpu
from asyncvmm.x86.load import Segment

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.requires("kvm")

MIB, GIB = 1 << 20, 1 << 30
ODD_BYTES = 67 * MIB
"""A size that no other mapping has."""
KVM_GET_CPUID2 = 0xC008AE91
KVM_TIMING_LEAF = 0x40000010
SYSENTER_CS, SYSENTER_ESP, NO_MSR = 0x174, 0x175, 0xDEAD

CONTENTS = Contents(long_mode_cpu(0x100000), (Segment(0x9000, b"small"), Segment(0x100000, bytes([0xF4]) * 20_000)))


def held() -> tuple[list[str], list[str]]:
    """Descriptors, and the mappings of VMs."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(word, 16) for word in line.split()[0].split("-")] for line in maps if "kvm" not in line]
    ours = [line for line in maps if "kvm-vcpu" in line]
    return sorted(os.listdir("/proc/self/fd")), ours + [
        f"{end - start}" for start, end in spans if end - start == ODD_BYTES
    ]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host on which the library cannot be loaded."""

    def forget() -> None:
        binding.load.cache_clear()
        executor.cache_clear()

    monkeypatch.setattr(binding, "LIBRARY", Path("/nonexistent/fastpath.so"))
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_what_is_loaded_is_there_and_the_first_vcpu_stands_at_the_entry() -> None:
    vm = KvmVm(blueprint(ODD_BYTES, 2, CONTENTS), Timeline())
    try:
        for segment in CONTENTS.segments:
            assert vm.memory.read(segment.address, len(segment.data)) == segment.data
        regs = KvmRegs()
        ioctl(vm.vcpus[0].fd, Request.KVM_GET_REGS, regs)
        assert regs.rip == 0x100000
    finally:
        vm.close()


def test_memory_beyond_the_hole_is_there_as_well() -> None:
    high = 4 * GIB + 4096
    contents = attrs.evolve(CONTENTS, segments=(*CONTENTS.segments, Segment(high, b"beyond")))
    vm = KvmVm(blueprint(5 * GIB, 1, contents), Timeline())
    try:
        assert len(vm.memory.regions) == 2
        assert vm.memory.read(high, 6) == b"beyond"
    finally:
        vm.close()


def test_contents_outside_of_memory_are_refused_before_anything_is_opened() -> None:
    before = held()
    for address in (ODD_BYTES - 2, ODD_BYTES, 1 << 62):
        with pytest.raises(ConfigError, match="guest address"):
            blueprint(ODD_BYTES, 1, attrs.evolve(CONTENTS, segments=(Segment(address, b"out"),)))
    assert held() == before


def _cut_after(steps_made: int, execute: Executor) -> Executor:
    """An executor whose chain ends early, as if the next step had failed."""

    def cut(steps: bytes, count: int, address: int, given: int) -> int:
        return execute(steps[: steps_made * STEP.size], steps_made, address, given)

    return cut


@pytest.mark.parametrize("execute", [native() or interpret, interpret], ids=["native", "interpreted"])
def test_wherever_a_creation_fails_nothing_is_left_of_it(execute: Executor) -> None:
    plan, before = blueprint(ODD_BYTES, 2, CONTENTS), held()
    program = plan.steps.program
    for steps_made in range(len(program.names)):
        made = program.run(*plan.given, execute=_cut_after(steps_made, execute))
        assert made.failure is not None
        assert made.failure.name == program.names[steps_made]
        made.undo()
        assert held() == before


def test_more_vcpus_than_the_host_offers_are_refused_and_nothing_is_left() -> None:
    system = KvmSystem.open()
    system.close()
    before, timeline = held(), Timeline()
    with pytest.raises(VcpuCountError, match=f"at most {system.max_vcpus} "):
        KvmVm(blueprint(ODD_BYTES, system.max_vcpus + 1), timeline)
    assert held() == before
    assert [(phase.name, phase.failed) for phase in timeline.phases] == [("kvm_open", True)]


def test_an_initrd_that_cannot_be_read_or_has_shrunk_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    short = tmp_path / "initrd"
    short.write_bytes(bytes(100))
    before = held()
    for path, found in ((tmp_path, "directory"), (short, "100 bytes")):
        fd = os.open(path, os.O_RDONLY)
        contents = attrs.evolve(CONTENTS, initrd_fd=fd, initrd_address=0x200000, initrd_size=101)
        with pytest.raises(InitrdError, match=found):
            KvmVm(blueprint(ODD_BYTES, 1, contents), Timeline())
        os.close(fd)
    assert held() == before


def test_a_vm_whose_tsc_is_not_as_foreseen_is_told_its_own_and_the_next_is_foreseen() -> None:
    expect_tsc_khz(1_234_567)
    vm = KvmVm(blueprint(ODD_BYTES, 2, CONTENTS), Timeline())
    try:
        for vcpu in vm.vcpus:
            assert _timing_leaf(vcpu.fd) in (vm.tsc_khz, None)
        cpuid = blueprint(ODD_BYTES, 2, CONTENTS).cpuid
        assert cpuid is not None
        assert cpuid.tsc_khz == vm.tsc_khz != 1_234_567
    finally:
        vm.close()


def _timing_leaf(fd: int) -> int | None:
    table = KvmCpuid2(nent=256)
    assert raw_ioctl(fd, KVM_GET_CPUID2, ctypes.addressof(table)) == 0
    found = {entry.function: entry.eax for entry in table.entries[: table.nent]}
    return found.get(KVM_TIMING_LEAF)


def test_msrs_behind_one_that_the_host_does_not_know_are_set_all_the_same() -> None:
    vm = KvmVm(blueprint(ODD_BYTES, 1), Timeline())
    try:
        fd = vm.vcpus[0].fd
        set_msrs_behind(fd, 0, ((NO_MSR, 1), (SYSENTER_CS, 0x11), (NO_MSR, 1), (NO_MSR, 2), (SYSENTER_ESP, 0x22)))
        set_msrs_behind(fd, 0, ((NO_MSR, 1),))
        found = KvmMsrs(nmsrs=2)
        found.entries[0], found.entries[1] = KvmMsrEntry(SYSENTER_CS), KvmMsrEntry(SYSENTER_ESP)
        assert ioctl(fd, Request.KVM_GET_MSRS, found) == 2
        assert (found.entries[0].data, found.entries[1].data) == (0x11, 0x22)
    finally:
        vm.close()


@pytest.mark.anyio
async def test_without_the_library_a_vm_is_created_and_runs_all_the_same(no_library: None, boot: Boot) -> None:
    assert executor() is interpret
    async with boot("toy", vcpus=2) as run:
        await run.end()
        assert run.output
