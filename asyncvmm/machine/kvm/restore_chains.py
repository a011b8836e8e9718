"""The chains of system calls that restore a VM: from nothing, as a shell ahead of that, and what a shell still lacks.

One for each shape of snapshot; what differs between two VMs of a shape is given to each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import attrs

from asyncvmm.machine.kvm.abi import KVM_PIT_SPEAKER_DUMMY, KvmPitConfig, Request
from asyncvmm.machine.kvm.creation import Creation, create_vcpu, create_vm, enable_rings, show_registers
from asyncvmm.machine.kvm.fastpath.chain import Argument, At, Chain, Program, SystemCall
from asyncvmm.machine.kvm.layers import Piece
from asyncvmm.machine.kvm.memory import map_memory, map_saved, register_memory
from asyncvmm.machine.kvm.state.arena import VcpuPlaces, VmPlaces
from asyncvmm.machine.kvm.state.setting import TscPlan, set_cpuid, set_vcpu, set_vm
from asyncvmm.machine.kvm.system import open_system
from asyncvmm.machine.kvm.working_set import Advice
from asyncvmm.x86.layout import ram_regions

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.ring_shape import RingShape

MOST_KEPT = 16
"""Chains kept for coming VMs of each kind."""


@attrs.frozen(kw_only=True, cache_hash=True)
class ShellShape:
    """What a VM is before it has any state. Hashable. ``ring``: of one with ``track_dirty``, None for bitmaps."""

    memory_bytes: int
    vcpus: int
    devices: int = 0
    track_dirty: bool = False
    ring: RingShape | None = None


def with_rings(shape: ShellShape) -> ShellShape:
    """The same with such rings as pay, if its writes are tracked; this host's KVM may be asked for them: not for the
    loop. Raises KvmUnavailable then."""
    return attrs.evolve(shape, ring=tracking_ring(shape.memory_bytes)) if shape.track_dirty else shape


def tracking_ring(memory_bytes: int, wanted: int | None = None) -> RingShape | None:
    """See ring_shape, which is imported for those alone whose writes are tracked."""
    from asyncvmm.machine.kvm.ring_shape import ring_shape

    return ring_shape(memory_bytes, wanted)


@attrs.frozen(kw_only=True, cache_hash=True)
class Shape:
    """What VMs restored alike have in common. Hashable. ``high``: interrupt lines that are raised."""

    shell: ShellShape
    pieces: tuple[Piece, ...]
    layers: int
    vcpus: tuple[VcpuPlaces, ...]
    vm: VmPlaces
    high: tuple[int, ...]


@lru_cache(MOST_KEPT)
def shell_chain(shape: ShellShape) -> Creation:
    """What makes a shell; it is given nothing. Raises MemorySizeError."""
    chain = Chain()
    return _finish(chain, _make_shell(chain, shape))


@lru_cache(MOST_KEPT)
def restoration(shape: Shape, tsc: TscPlan, ahead: tuple[Advice, ...] = ()) -> Creation:
    """The whole chain; it is given the arena's address, a TSC offset for each vCPU, and the layers' descriptors.

    ahead: memory to be made present, see working_set.advices. Raises MemorySizeError.
    """
    vcpus = shape.shell.vcpus
    chain = Chain(given=1 + vcpus + shape.layers)
    layers = [chain.given(1 + vcpus + index) for index in range(shape.layers)]
    steps = _make_shell(chain, shape.shell, (shape.pieces, layers))
    set_state(chain, shape, tsc, steps.vm, [vcpu.fd for vcpu in steps.vcpus])
    _populate(chain, steps.memory, ahead)
    return _finish(chain, steps)


@lru_cache(MOST_KEPT)
def filling(shape: Shape, tsc: TscPlan, ahead: tuple[Advice, ...] = ()) -> Program:
    """What a shell still lacks; it is given what ``restoration`` is, and the VM, its memory, and the vCPUs."""
    vcpus, first = shape.shell.vcpus, 1 + shape.shell.vcpus
    held = first + shape.layers
    chain = Chain(given=held + 2 + vcpus)
    with chain.phase("memory_state_write"):
        map_saved(chain, chain.given(held + 1), shape.pieces, [chain.given(first + n) for n in range(shape.layers)])
    set_state(chain, shape, tsc, chain.given(held), [chain.given(held + 2 + n) for n in range(vcpus)])
    _populate(chain, chain.given(held + 1), ahead)
    return chain.program()


def _make_shell(chain: Chain, shape: ShellShape, saved: tuple[Sequence[Piece], Sequence[At]] | None = None) -> Creation:
    """Memslots come before the interrupt controllers, as in creation.py, and the snapshot's pages before both."""
    regions = ram_regions(shape.memory_bytes)
    with chain.phase("kvm_open"):
        system = open_system(chain, vcpus=shape.vcpus)
    with chain.phase("memory_alloc"):
        memory = map_memory(chain, regions)
    if saved is not None:
        with chain.phase("memory_state_write"):
            map_saved(chain, memory, *saved)
        chain.is_ready_ahead()
    vm, ring = create_vm(chain, system), shape.ring
    if ring is not None:
        enable_rings(chain, vm, ring)
    with chain.phase("memory_register"):
        register_memory(chain, vm, memory, regions, track_dirty=shape.track_dirty)
        registers = show_registers(chain, vm, len(regions), shape.devices) if shape.devices else None
    with chain.phase("irqchip_create"):
        chain.ioctl(Request.KVM_CREATE_IRQCHIP, vm)
        chain.ioctl(Request.KVM_CREATE_PIT2, vm, chain.data(KvmPitConfig(KVM_PIT_SPEAKER_DUMMY)))
    with chain.phase("vcpu_create"):
        vcpus = tuple(create_vcpu(chain, vm, index, system, ring) for index in range(shape.vcpus))
        tsc_khz = chain.ioctl(Request.KVM_GET_TSC_KHZ, vcpus[0].fd)
    size, devices = 0 if ring is None else ring.size, shape.devices
    return Creation(_NO_PROGRAM, regions, system, vm, memory, vcpus, tsc_khz, None, (), registers, devices, size)


_NO_PROGRAM = Chain().program()


def _finish(chain: Chain, steps: Creation) -> Creation:
    return attrs.evolve(steps, program=chain.program())


def set_state(chain: Chain, shape: Shape, tsc: TscPlan, vm: Argument, fds: Sequence[Argument]) -> None:
    """Append what gives the VM and its vCPUs the state that was saved."""
    arena = chain.given(0)
    with chain.phase("cpuid_config"):
        set_cpuid(chain, fds, arena, shape.vcpus)
    with chain.phase("vcpu_state_restore"):
        for index, (fd, places) in enumerate(zip(fds, shape.vcpus, strict=True)):
            set_vcpu(chain, index, fd, arena, places, tsc, chain.given(1 + index))
    with chain.phase("device_state_restore"):
        set_vm(chain, vm, arena, shape.vm, shape.high)


def _populate(chain: Chain, memory: At, ahead: Sequence[Advice]) -> None:
    """What cannot be made present is left to the guest's faults."""
    if ahead:
        with chain.phase("memory_state_write"):
            for advice, offset, size in ahead:
                chain.call("madvise", SystemCall.MADVISE, memory + offset, size, advice, may_fail=True)
