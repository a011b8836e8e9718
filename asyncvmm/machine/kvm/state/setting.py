"""Giving a new VM the state that was saved: the KVM_SET_* calls of a chain, in the order in which they work.

Facts: Documentation/virt/kvm/api.rst. CPUID decides what the other calls accept. The time stamp counter comes before
the deadline that is compared with it, and the deadline after the local APIC whose mode it is for. The interrupt
controllers come after the vCPUs that their requests go to.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

import attrs

from asyncvmm.errors import AsyncVMMError, SnapshotDamaged, SnapshotMismatch
from asyncvmm.machine.kvm.abi import (
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    KvmDeviceAttr,
    KvmIrqLevel,
    Request,
)
from asyncvmm.machine.kvm.fastpath.chain import Argument, At, Chain, Failure
from asyncvmm.machine.kvm.state.arena import MsrBatch, VcpuPlaces, VmPlaces
from asyncvmm.machine.kvm.state.vcpu import VcpuState
from asyncvmm.machine.kvm.system import refusal

_MARK = " of vCPU "
_VM_STEPS = (Request.KVM_IRQ_LINE, Request.KVM_SET_PIT2, Request.KVM_SET_CLOCK, Request.KVM_SET_IRQCHIP)
_CLOCK_MSR = "KVM_SET_MSRS of a clock"
_SHOWS_THE_HOST = (Request.KVM_SET_CPUID2.name, Request.KVM_SET_TSC_KHZ.name, _CLOCK_MSR)
"""Steps that fail for what the host is, not for what was saved."""
_NOT_THE_STATES_FAULT = (errno.EBADF, errno.EAGAIN, errno.ENOMEM)
TSC_OFFSET_STEP = Request.KVM_SET_DEVICE_ATTR.name


@attrs.frozen
class TscPlan:
    """How the time stamp counters are set: by KVM's offset where ``by_offset``, else by the register, which KVM brings
    in step with those of other vCPUs as it sees fit. ``khz``: the frequency they are to be scaled to, None for none."""

    by_offset: bool
    khz: int | None = None


def set_cpuid(chain: Chain, fds: Sequence[Argument], state: At, places: Sequence[VcpuPlaces]) -> None:
    """Append KVM_SET_CPUID2 for each vCPU. ``state`` is the arena's address."""
    for index, (fd, vcpu) in enumerate(zip(fds, places, strict=True)):
        _set(chain, Request.KVM_SET_CPUID2, index, fd, state + vcpu.cpuid)


def set_vcpu(
    chain: Chain, index: int, fd: Argument, state: At, places: VcpuPlaces, tsc: TscPlan, tsc_offset: At
) -> None:
    """Append what gives one vCPU its state. ``tsc_offset``: the value for KVM_VCPU_TSC_OFFSET."""
    if tsc.khz is not None:
        _set(chain, Request.KVM_SET_TSC_KHZ, index, fd, tsc.khz)
    for request, at in (
        (Request.KVM_SET_MP_STATE, places.mp_state),
        (Request.KVM_SET_REGS, places.regs),
        (Request.KVM_SET_SREGS, places.sregs),
        (Request.KVM_SET_XSAVE, places.xsave),
        (Request.KVM_SET_XCRS, places.xcrs),
        (Request.KVM_SET_DEBUGREGS, places.debugregs),
        (Request.KVM_SET_LAPIC, places.lapic),
    ):
        if at is not None:
            _set(chain, request, index, fd, state + at)
    if tsc.by_offset:
        _set_tsc_offset(chain, index, fd, tsc_offset)
    else:
        _set_msrs(chain, index, fd, state, places.tsc, _CLOCK_MSR)
    _set_msrs(chain, index, fd, state, places.msrs)
    if places.deadline is not None:
        _set_msrs(chain, index, fd, state, places.deadline, _CLOCK_MSR)
    _set(chain, Request.KVM_SET_VCPU_EVENTS, index, fd, state + places.events)
    chain.ioctl(Request.KVM_KVMCLOCK_CTRL, fd, may_fail=True)  # it has nothing to say to a guest without kvmclock


def set_vm(chain: Chain, vm: Argument, state: At, places: VmPlaces, high: Sequence[int]) -> None:
    """Append what gives the VM its timer, clock and interrupt controllers; the lines in ``high`` are raised before."""
    for gsi in high:
        chain.ioctl(Request.KVM_IRQ_LINE, vm, chain.data(KvmIrqLevel(gsi, 1)))
    chain.ioctl(Request.KVM_SET_PIT2, vm, state + places.pit)
    chain.ioctl(Request.KVM_SET_CLOCK, vm, state + places.clock)
    for chip in places.irqchips:
        chain.ioctl(Request.KVM_SET_IRQCHIP, vm, state + chip)


def setting_error(failure: Failure, vcpus: Sequence[VcpuState]) -> AsyncVMMError | None:
    """What it means that a step of these failed, ``vcpus`` being what was to be set; None for another step."""
    name, _, vcpu = failure.name.partition(_MARK)
    if not vcpu and name not in {request.name for request in _VM_STEPS}:
        return None
    what = failure.name
    if failure.errno in _NOT_THE_STATES_FAULT:
        return refusal(Failure(name, failure.result))
    if name == Request.KVM_SET_MSRS.name and not failure.errno:
        index, value = vcpus[int(vcpu)].msr_values()[failure.result]
        return SnapshotMismatch(
            f"MSR {index:#x}{_MARK}{vcpu}", expected=f"a KVM that takes {value:#x}", found="refusal"
        )
    if name.startswith(_SHOWS_THE_HOST):
        return SnapshotMismatch(what, expected="a KVM that takes it", found=os.strerror(failure.errno))
    return SnapshotDamaged(what, expected="a state that KVM takes", found=os.strerror(failure.errno))


def _set(chain: Chain, request: Request, index: int, fd: Argument, argument: Argument) -> None:
    chain.ioctl(request, fd, argument, name=f"{request.name}{_MARK}{index}")


def _set_msrs(
    chain: Chain, index: int, fd: Argument, state: At, batch: MsrBatch, name: str = Request.KVM_SET_MSRS.name
) -> None:
    if batch.count:
        request, at = Request.KVM_SET_MSRS, state + batch.at
        chain.ioctl(request, fd, at, least=batch.count, name=f"{name}{_MARK}{index}")


def _set_tsc_offset(chain: Chain, index: int, fd: Argument, offset: At) -> None:
    cell = chain.data(ctypes.c_uint64())
    attribute = chain.data(KvmDeviceAttr(0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, 0))
    chain.store(cell, offset)
    chain.store(attribute + KvmDeviceAttr.addr.offset, cell)
    _set(chain, Request.KVM_SET_DEVICE_ATTR, index, fd, attribute)
