"""How a VM is created, from /dev/kvm to vCPUs ready to run: written down as one chain of system calls for each shape.

VMs of one shape (memory, vCPUs, where what is loaded, first registers) are created by the same chain; see
fastpath/chain.py for why that is worth it. Phases are the chain's own.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import attrs

from asyncvmm.machine.kvm.abi import (
    KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY,
    KvmEnableCap,
    KvmPitConfig,
    KvmUserspaceMemoryRegion,
    Request,
)
from asyncvmm.machine.kvm.contents import Contents, Loader, Shape
from asyncvmm.machine.kvm.fastpath.chain import At, Chain, Program, SystemCall
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.memory import map_memory, register_memory
from asyncvmm.machine.kvm.registers import set_boot_msrs, set_boot_state, set_lint_pins
from asyncvmm.machine.kvm.system import HostCpuid, SystemSteps, guest_cpuid, host_cpuid, open_system
from asyncvmm.x86.layout import IDENTITY_MAP_ADDRESS, MMIO_BASE, MMIO_SIZE, TSS_ADDRESS, Region, ram_regions

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.ring_shape import RingShape

MOST_KEPT = 16
"""Chains kept for coming VMs of the same shape, some KiB each."""


@attrs.frozen
class GuestCpuid:
    """What CPUID tables are made of: what the host offers, and the TSC's frequency, None where it is not known."""

    host: HostCpuid
    tsc_khz: int | None


@attrs.frozen
class VcpuSteps:
    """Where a vCPU's descriptor and its kvm_run page are left, and its dirty ring, if it has one."""

    fd: At
    page: At
    ring: At | None = None


@attrs.frozen(eq=False)
class Creation:
    """The chain of a shape, and where it leaves what. ``msrs_set``: how many of boot_msrs() each vCPU took.

    If there are contents, ``program`` is given the initrd's descriptor and the addresses of ``Contents.sources``.
    """

    program: Program
    regions: tuple[Region, ...]
    system: SystemSteps
    vm: At
    memory: At
    vcpus: tuple[VcpuSteps, ...]
    tsc_khz: At
    initrd_read: At | None
    msrs_set: tuple[At, ...]
    registers: At | None = None
    """The pages of the devices' registers, ``devices`` of them; None without devices."""
    devices: int = 0
    ring_bytes: int = 0
    """Of each vCPU's dirty ring; 0 if they have none."""


@attrs.frozen(eq=False)
class Blueprint:
    """A VM to be created: the chain of its shape, and what this VM is filled with. Nothing is open or started yet."""

    steps: Creation
    contents: Contents | None
    cpuid: GuestCpuid | None
    given: tuple[int, ...]
    """What ``steps.program`` is given."""
    sources: tuple[Pinned, ...]
    """The buffers whose addresses are among it."""


_seen_tsc_khz: int | None = None
"""The TSC's frequency as the newest VM had it: a VM's CPUID is written down before the VM can be asked."""


def blueprint(
    memory_bytes: int,
    vcpus: int,
    contents: Contents | None = None,
    *,
    devices: int = 0,
    track_dirty: bool = False,
    ring: RingShape | None = None,
) -> Blueprint:
    """Prepare the creation of a VM; without contents, of one that is given nothing to run. ``devices``: how many
    virtio-mmio devices it has. track_dirty: its dirty log is on from the start, by rings of that shape or by bitmaps.

    Raises MemorySizeError, ConfigError for contents outside of memory, and for the first VM of a process, which asks
    what CPUID it can have, KvmUnavailable.
    """
    if contents is None:
        return Blueprint(_creation(memory_bytes, vcpus, devices, None, None, track_dirty, ring), None, None, (), ())
    cpuid, sources = GuestCpuid(host_cpuid(), _seen_tsc_khz), contents.sources()
    steps = _creation(memory_bytes, vcpus, devices, contents.shape(), cpuid, track_dirty, ring)
    given = (contents.initrd_fd, *[source.address for source in sources])
    return Blueprint(steps, contents, cpuid, given, tuple(sources))


def seen_tsc_khz() -> int | None:
    """What the newest VM had, None before there was one."""
    return _seen_tsc_khz


def expect_tsc_khz(tsc_khz: int) -> None:
    """Blueprints from now on are made for that frequency."""
    global _seen_tsc_khz
    _seen_tsc_khz = tsc_khz


@lru_cache(MOST_KEPT)
def _creation(
    memory_bytes: int,
    vcpus: int,
    devices: int,
    shape: Shape | None,
    cpuid: GuestCpuid | None,
    track_dirty: bool,
    ring: RingShape | None,
) -> Creation:
    """The chain for VMs like that; without ``shape`` nothing is loaded and no vCPU is given a state.

    Raises MemorySizeError, and ConfigError for contents outside of memory.
    """
    chain = Chain(given=1 + shape.sources if shape else 0)
    steps = _make(chain, ram_regions(memory_bytes), vcpus, devices, track_dirty, ring)
    if shape is not None and cpuid is not None:
        steps = _fill(chain, steps, shape, cpuid)
    return attrs.evolve(steps, program=chain.program())


_NO_PROGRAM = Chain().program()


def _make(
    chain: Chain, regions: tuple[Region, ...], vcpus: int, devices: int, track_dirty: bool, ring: RingShape | None
) -> Creation:
    """Append what makes the VM, new and empty."""
    with chain.phase("kvm_open"):
        system = open_system(chain, vcpus=vcpus)
    with chain.phase("vm_create"):
        vm = create_vm(chain, system)
        if ring is not None:
            enable_rings(chain, vm, ring)
    memory, registers = _add_memory(chain, vm, regions, devices, track_dirty)
    create_irqchip(chain, vm)
    with chain.phase("vcpu_create"):
        made = tuple(create_vcpu(chain, vm, index, system, ring) for index in range(vcpus))
        tsc_khz = chain.ioctl(Request.KVM_GET_TSC_KHZ, made[0].fd)
    ring_bytes = ring.size if ring is not None else 0
    return Creation(_NO_PROGRAM, regions, system, vm, memory, made, tsc_khz, None, (), registers, devices, ring_bytes)


def _add_memory(
    chain: Chain, vm: At, regions: tuple[Region, ...], devices: int, track_dirty: bool
) -> tuple[At, At | None]:
    """Before the interrupt controllers: creating those leaves the kernel waiting for readers of the VM's buses, and a
    memslot that is registered then waits with it, for 4 to 8 ms."""
    with chain.phase("memory"):
        with chain.phase("memory_alloc"):
            memory = map_memory(chain, regions)
        with chain.phase("memory_register"):
            register_memory(chain, vm, memory, regions, track_dirty=track_dirty)
            registers = show_registers(chain, vm, len(regions), devices) if devices else None
    return memory, registers


def _fill(chain: Chain, steps: Creation, shape: Shape, cpuid: GuestCpuid) -> Creation:
    """Append what loads its memory and gives its vCPUs their first state."""
    sources = [chain.given(1 + index) for index in range(shape.sources)]
    read = Loader(chain, steps.memory, steps.regions, chain.given(0), sources).load(shape)
    msrs_set = _configure(chain, [vcpu.fd for vcpu in steps.vcpus], shape, cpuid)
    return attrs.evolve(steps, initrd_read=read, msrs_set=msrs_set)


def create_vm(chain: Chain, system: SystemSteps) -> At:
    """Append the steps that create a VM and reserve the addresses that KVM needs for itself."""
    with chain.phase("kvm_create_vm"):
        vm = chain.closing(chain.ioctl(Request.KVM_CREATE_VM, system.fd))
    with chain.phase("vm_arch_setup"):
        chain.ioctl(Request.KVM_SET_IDENTITY_MAP_ADDR, vm, chain.data(ctypes.c_uint64(IDENTITY_MAP_ADDRESS)))
        chain.ioctl(Request.KVM_SET_TSS_ADDR, vm, TSS_ADDRESS)
    return vm


def enable_rings(chain: Chain, vm: At, ring: RingShape) -> None:
    """Append the step that has each vCPU created from then on have a dirty ring. KVM_GET_DIRTY_LOG fails then."""
    wanted = KvmEnableCap(cap=ring.capability)
    wanted.args[0] = ring.size
    chain.ioctl(Request.KVM_ENABLE_CAP, vm, chain.data(wanted))


def create_irqchip(chain: Chain, vm: At) -> None:
    """Append the steps that create the interrupt controllers and the timer."""
    with chain.phase("irqchip_create"):
        chain.ioctl(Request.KVM_CREATE_IRQCHIP, vm)
        chain.ioctl(Request.KVM_CREATE_PIT2, vm, chain.data(KvmPitConfig(KVM_PIT_SPEAKER_DUMMY)))


def show_registers(chain: Chain, vm: At, slot: int, devices: int) -> At:
    """Append the steps that show each device's page of registers to the guest, as memory it can only read.

    Its writes come out as exits, or as events where an ioeventfd takes them (KVM API, KVM_MEM_READONLY).
    """
    size = devices * MMIO_SIZE
    pages = chain.map("mmap of device registers", size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chain.call("madvise", SystemCall.MADVISE, pages, size, mmap.MADV_DONTFORK)
    record = chain.data(KvmUserspaceMemoryRegion(slot, KVM_MEM_READONLY, MMIO_BASE, size))
    chain.store(record + KvmUserspaceMemoryRegion.userspace_addr.offset, pages)
    chain.ioctl(Request.KVM_SET_USER_MEMORY_REGION, vm, record)
    return pages


def create_vcpu(chain: Chain, vm: At, index: int, system: SystemSteps, ring: RingShape | None = None) -> VcpuSteps:
    """Append the steps that create a vCPU and map its kvm_run page, and its dirty ring if that was enabled."""
    fd = chain.closing(chain.ioctl(Request.KVM_CREATE_VCPU, vm, index))
    page = chain.map("mmap of kvm_run", system.run_size, mmap.MAP_SHARED, fd)
    return VcpuSteps(fd, page, None if ring is None else _map_ring(chain, fd, ring.size))


def _map_ring(chain: Chain, fd: At, size: int) -> At:
    protection, offset = mmap.PROT_READ | mmap.PROT_WRITE, KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
    call = chain.call("mmap of dirty ring", SystemCall.MMAP, 0, size, protection, mmap.MAP_SHARED, fd, offset)
    return chain.undoing(SystemCall.MUNMAP, call, size)


def _configure(chain: Chain, vcpus: Sequence[At], shape: Shape, cpuid: GuestCpuid) -> tuple[At, ...]:
    """Every vCPU is given its CPUID, the first one the state in which the boot protocol enters the kernel. The others
    stay as KVM makes them: waiting for INIT and SIPI."""
    with chain.phase("vcpu_config"):
        with chain.phase("cpuid_config"):
            set_cpuid(chain, vcpus, cpuid)
        with chain.phase("register_config"):
            set_lint_pins(chain, vcpus)
            msrs_set = tuple(set_boot_msrs(chain, vcpu) for vcpu in vcpus)
            set_boot_state(chain, vcpus[0], shape.cpu)
    return msrs_set


def set_cpuid(chain: Chain, vcpus: Sequence[At], cpuid: GuestCpuid) -> None:
    """Append KVM_SET_CPUID2 for each vCPU."""
    for index, vcpu in enumerate(vcpus):
        table = guest_cpuid(cpuid.host, vcpu=index, vcpus=len(vcpus), tsc_khz=cpuid.tsc_khz)
        chain.ioctl(Request.KVM_SET_CPUID2, vcpu, chain.shared(table))
