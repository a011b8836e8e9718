"""What one process asks /dev/kvm once and keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.system import KvmSystem, cpuid_table, guest_cpuid, host_cpuid, supported_cpuid
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.cpuid import vcpu_cpuid

pytestmark = pytest.mark.requires("kvm")

TSC_KHZ = 2_000_000
MEMORY_BYTES = 16 << 20


@pytest.fixture
def kvm_fd() -> Iterator[int]:
    system = KvmSystem.open()
    yield system.fd
    system.close()


def test_a_kept_cpuid_table_says_what_a_fresh_one_would(kvm_fd: int) -> None:
    for vcpu in range(3):
        fresh = cpuid_table(vcpu_cpuid(supported_cpuid(kvm_fd), vcpu=vcpu, vcpus=3, tsc_khz=TSC_KHZ))
        assert bytes(guest_cpuid(host_cpuid(), vcpu=vcpu, vcpus=3, tsc_khz=TSC_KHZ)) == bytes(fresh)


def test_two_vms_of_one_shape_share_their_cpuid_table() -> None:
    first = guest_cpuid(host_cpuid(), vcpu=0, vcpus=1, tsc_khz=TSC_KHZ)
    assert guest_cpuid(host_cpuid(), vcpu=0, vcpus=1, tsc_khz=TSC_KHZ) is first


def test_another_shape_has_a_table_of_its_own() -> None:
    one = guest_cpuid(host_cpuid(), vcpu=0, vcpus=1, tsc_khz=TSC_KHZ)
    assert bytes(guest_cpuid(host_cpuid(), vcpu=1, vcpus=2, tsc_khz=TSC_KHZ)) != bytes(one)
    assert bytes(guest_cpuid(host_cpuid(), vcpu=0, vcpus=1, tsc_khz=TSC_KHZ + 1)) != bytes(one)


def test_memory_is_registered_before_the_interrupt_controllers_exist() -> None:
    timeline = Timeline()
    KvmVm(blueprint(MEMORY_BYTES, 1), timeline).close()
    order = [phase.name for phase in timeline.phases]
    assert order.index("memory_register") < order.index("irqchip_create") < order.index("vcpu_create")
