"""What is no state of a machine is refused by what it is, and nothing of it stays; and no state harms the process."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncvmm.errors import KvmIoctlError, SnapshotDamaged, SnapshotError, SnapshotMismatch, VcpuCountError
from asyncvmm.machine.kvm.restoring import Shell, restore_blueprint
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.timing.timeline import Timeline
from tests.kvm.conftest import IN_LAB
from tests.support.held_vm import HeldVm, Saved, descriptors, restored, with_field, with_section

pytestmark = pytest.mark.requires("kvm")

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


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("vcpu0", "regs", bytes(143)),
        ("vcpu0", "sregs", b""),
        ("vcpu0", "xsave", bytes(4095)),
        ("vcpu0", "xsave", bytes(2 << 20)),
        ("vcpu0", "cpuid", bytes(41)),
        ("vcpu0", "cpuid", bytes(40 * 257)),
        ("vcpu0", "msrs", bytes(16 * 257)),
        ("vcpu0", "msrs", struct.pack("<IIQ", 0x1B, 0, 0xFEE00000)),
        ("vcpu0", "msrs", bytes(15)),
        ("vcpu0", "lapic", bytes(1023)),
        ("vcpu0", "events", None),
        ("vcpu0", "mp_state", -1),
        ("vcpu0", "mp_state", True),
        ("vcpu0", "tsc_khz", 0),
        ("vcpu0", "tsc", 1.5),
        ("vcpu0", "xcrs", bytes(416)),
        ("vm", "pic_master", bytes(511)),
        ("vm", "ioapic", "text"),
        ("vm", "pit", bytes(113)),
        ("vm", "clock", -5),
        ("vm", "host_tsc", "now"),
    ],
)
def test_fields_of_the_wrong_size_or_kind_are_refused(saved: Saved, section: str, name: str, value: object) -> None:
    with pytest.raises(SnapshotDamaged):
        restore_blueprint(with_field(saved.plan, section, name, value))


@pytest.mark.parametrize("name", ["vm", "board", "vcpu0", "vcpu1"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff\xff", b"null"])
def test_missing_and_empty_sections_are_refused(saved: Saved, name: str, content: bytes | None) -> None:
    if content is None:
        sections = {key: value for key, value in saved.plan.saved.sections.items() if key != name}
        plan = attrs.evolve(saved.plan, saved=attrs.evolve(saved.plan.saved, sections=sections))
    else:
        plan = with_section(saved.plan, name, content)
    with pytest.raises(SnapshotDamaged):
        restore_blueprint(plan)


def test_what_kvm_itself_refuses_is_told_with_the_calls_name_and_nothing_stays(saved: Saved) -> None:
    plan = with_field(saved.plan, "vcpu1", "mp_state", 99)
    before = descriptors()
    with pytest.raises(SnapshotDamaged, match="KVM_SET_MP_STATE of vCPU 1"):
        restored(plan)
    blueprint = restore_blueprint(plan)
    with pytest.raises(SnapshotDamaged, match="KVM_SET_MP_STATE of vCPU 1"):
        blueprint.fill(Shell(blueprint.shape.shell, Timeline()), Timeline())
    assert descriptors() == before


def test_ram_that_lies_elsewhere_is_refused(saved: Saved) -> None:
    plan = attrs.evolve(
        saved.plan, saved=attrs.evolve(saved.plan.saved, regions=((4096, saved.plan.saved.memory.size),))
    )
    with pytest.raises(SnapshotMismatch, match="memory layout"):
        restore_blueprint(plan)


def test_a_memory_file_that_is_none_is_damage(saved: Saved) -> None:
    read, write = os.pipe()
    plan = attrs.evolve(saved.plan, layers=(attrs.evolve(saved.plan.layers[0], fd=read),))
    try:
        with pytest.raises(SnapshotDamaged, match="memory"):
            restored(plan)
    finally:
        os.close(read)
        os.close(write)


def test_too_many_vcpus_are_refused(saved: Saved) -> None:
    sections = {**saved.plan.saved.sections}
    for index in range(2, 5000):
        sections[f"vcpu{index}"] = sections["vcpu1"]
    plan = attrs.evolve(saved.plan, saved=attrs.evolve(saved.plan.saved, vcpus=5000, sections=sections))
    with pytest.raises(VcpuCountError):
        restored(plan)


@settings(max_examples=10 if IN_LAB else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mangled_state_makes_a_guest_or_is_refused(saved: Saved, data: st.DataObject) -> None:
    """Whatever guest comes of it: it runs for a moment, and the process that runs it lives."""
    name = data.draw(st.sampled_from(["vcpu0", "vcpu1", "vm"]))
    record = decode(saved.plan.saved.sections[name])
    field = data.draw(st.sampled_from(sorted(record)))
    record[field] = mangled(record[field], data)
    plan = with_section(saved.plan, name, encode(record))
    try:
        vm = HeldVm.restore(attrs.evolve(saved, plan=plan), from_shell=True)
    except (SnapshotError, KvmIoctlError):
        return
    vm.run()
    time.sleep(0.001)
    vm.hold()
    vm.close()


def mangled(value: object, data: st.DataObject) -> object:
    """Another value of the kind, or of any."""
    if isinstance(value, bytes) and value and data.draw(st.integers(0, 9)):
        changed = bytearray(value)
        for _ in range(data.draw(st.integers(1, 8))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)
    if isinstance(value, int) and data.draw(st.integers(0, 9)):
        return data.draw(st.integers(0, (1 << 64) - 1))
    return data.draw(st.none() | st.integers(-5, 5) | st.binary(max_size=9) | st.text(max_size=5))
