"""The guest's TSC on the host's clock: KVM's offset between the two TSCs, and samples of the host's TSC and clock.

Facts: "KVM_VCPU_TSC_CTRL" in Documentation/virt/kvm/devices/vcpu.rst, KVM_GET_MSRS in Documentation/virt/kvm/api.rst.
Not KVM_GET_CLOCK: it pairs kvmclock with CLOCK_REALTIME and the TSC, and the guest's CLOCK_MONOTONIC is neither; the
guest says itself what that was at a value of its TSC. No VM here is given a TSC frequency of its own, so that KVM
scales nothing and the offset is all there is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from asyncvmm.errors import KvmIoctlError
from asyncvmm.machine.host_clock import clock_sample, realtime_ahead_ns
from asyncvmm.machine.kvm.abi import (
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    KvmDeviceAttr,
    KvmMsrEntry,
    KvmMsrs,
    Request,
)
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.timing.tsc import ClockSample, GuestTime, TscOffset, guest_time, host_instant

IA32_TIME_STAMP_COUNTER = 0x10


class GuestTsc:
    """Turns values of one guest's TSC into host time, from the moment this is made on."""

    def __init__(self, offset: TscOffset, first: ClockSample) -> None:
        self._offset = offset
        self._first = first

    @classmethod
    def of(cls, vcpu_fds: Sequence[int]) -> GuestTsc | None:
        """For vCPUs that have not been started yet. None where the host does not say what it takes."""
        first = clock_sample()
        offset = common_offset([tsc_offset(fd) for fd in vcpu_fds])
        return None if first is None or offset is None else cls(offset, first)

    @classmethod
    def at_offset(cls, offset: int) -> GuestTsc | None:
        """For vCPUs that were given this offset."""
        first = clock_sample()
        return None if first is None else cls(TscOffset.of(offset % (1 << 64)), first)

    def instant(self, tsc: int) -> tuple[int, int] | None:
        """CLOCK_MONOTONIC ns when the guest's TSC was ``tsc``, and the error in ns; None if that was never."""
        now = clock_sample()
        return None if now is None else host_instant(tsc, self._offset, self._first, now)

    def now(self, khz: int) -> GuestTime | None:
        """The guest's TSC now, beside the host's time; ``khz`` is its frequency."""
        ahead_ns = realtime_ahead_ns()
        sample = clock_sample()
        return None if sample is None else guest_time(sample, ahead_ns, self._offset, khz)


def common_offset(offsets: Sequence[TscOffset | None]) -> TscOffset | None:
    """What is true of every vCPU, for the guest does not say which one it read; None if that is nothing."""
    known = [offset for offset in offsets if offset is not None]
    if not known or len(known) < len(offsets):
        return None
    low, high = max(offset.low for offset in known), min(offset.high for offset in known)
    return TscOffset(low, high) if low <= high else None


def tsc_offset(vcpu_fd: int) -> TscOffset | None:
    """KVM's TSC offset of a vCPU that does not run; None where it cannot be had."""
    return offset_by_attribute(vcpu_fd) or offset_by_msr(vcpu_fd)


def offset_by_attribute(vcpu_fd: int) -> TscOffset | None:
    """Exactly, by KVM_VCPU_TSC_OFFSET. None before Linux 5.16."""
    value = ctypes.c_uint64()
    attribute = KvmDeviceAttr(0, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, ctypes.addressof(value))
    try:
        ioctl(vcpu_fd, Request.KVM_GET_DEVICE_ATTR, attribute)
    except KvmIoctlError:
        return None
    return TscOffset.of(value.value)


def offset_by_msr(vcpu_fd: int) -> TscOffset | None:
    """Within a microsecond or so: the guest's TSC as KVM_GET_MSRS shows it, between two samples of the host's."""
    msrs = KvmMsrs(nmsrs=1)
    msrs.entries[0] = KvmMsrEntry(IA32_TIME_STAMP_COUNTER, 0, 0)
    before = clock_sample()
    try:
        found = ioctl(vcpu_fd, Request.KVM_GET_MSRS, msrs)
    except KvmIoctlError:
        return None
    after = clock_sample()
    if before is None or after is None or not found:
        return None
    tsc = msrs.entries[0].data
    return TscOffset(TscOffset.of(tsc - after.tsc).low, TscOffset.of(tsc - before.tsc_end).high)
