"""A vCPU's state as a section of a snapshot.

Facts: the KVM_GET_* calls in Documentation/virt/kvm/api.rst. Their order matters: KVM_GET_MP_STATE takes a pending INIT
or SIPI in first, the TSC deadline is read before the local APIC that its expiry sets bits in, and the events, which the
other calls may still change, come last.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache

import attrs

from asyncvmm.machine.kvm.abi import (
    MAX_CPUID_ENTRIES,
    XSAVE_BYTES,
    KvmCpuid2,
    KvmCpuidEntry2,
    KvmDebugregs,
    KvmLapicState,
    KvmMpState,
    KvmRegs,
    KvmSregs,
    KvmVcpuEvents,
    KvmXcrs,
    Request,
)
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.guest_tsc import offset_by_attribute
from asyncvmm.machine.kvm.state.fields import U64_MOST, Fields
from asyncvmm.machine.kvm.state.host import HostState, host_state
from asyncvmm.machine.kvm.state.lapic import keep_deadline, keep_tick
from asyncvmm.machine.kvm.state.msrs import (
    ALLOWED,
    IA32_TIME_STAMP_COUNTER,
    IA32_TSC_DEADLINE,
    is_at_reset,
    msr_indices,
)
from asyncvmm.machine.kvm.state.task_register import without_busy
from asyncvmm.snapshot.codec import encode
from asyncvmm.x86.cpuid import CpuidEntry

MOST_XSAVE_BYTES = 1 << 20
MOST_MSRS = 256
"""What one KVM_SET_MSRS takes (MAX_IO_MSRS)."""
MOST_TSC_KHZ = 1 << 31
_MSR = struct.Struct("<IIQ")
"""struct kvm_msr_entry."""
_MSR_BYTES = _MSR.size
_CPUID_BYTES = ctypes.sizeof(KvmCpuidEntry2)
_HEADER_BYTES = 8
_MOST_MP_STATE = 0xFF


@attrs.frozen(kw_only=True)
class VcpuState:
    """A saved vCPU: KVM's structures as bytes. ``cpuid`` and ``msrs`` are their entries alone.

    xsave: on a processor without XSAVE it has what FXSAVE gives (KVM_GET_FPU would leave MXCSR out); xcrs is None then.
    tsc: the vCPU's time stamp counter when it was
    saved; tsc_offset: what KVM added to the host's, modulo 2^64, None where it did not say. tsc_deadline: None where
    there is no such register.
    """

    mp_state: int
    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes | None
    debugregs: bytes
    lapic: bytes
    tsc_khz: int
    cpuid: bytes
    msrs: bytes
    tsc: int
    tsc_offset: int | None
    tsc_deadline: int | None
    events: bytes

    @classmethod
    def of(cls, name: str, section: bytes) -> VcpuState:
        """A section, checked. Raises SnapshotDamaged."""
        fields = Fields.of(name, section)
        state = cls(
            mp_state=fields.integer("mp_state", _MOST_MP_STATE),
            regs=fields.exactly("regs", ctypes.sizeof(KvmRegs)),
            sregs=fields.exactly("sregs", ctypes.sizeof(KvmSregs)),
            xsave=fields.content("xsave", XSAVE_BYTES, MOST_XSAVE_BYTES, 4),
            xcrs=fields.exactly_or_none("xcrs", ctypes.sizeof(KvmXcrs)),
            debugregs=fields.exactly("debugregs", ctypes.sizeof(KvmDebugregs)),
            lapic=fields.exactly("lapic", ctypes.sizeof(KvmLapicState)),
            tsc_khz=fields.integer("tsc_khz", MOST_TSC_KHZ, 1),
            cpuid=fields.content("cpuid", 0, MAX_CPUID_ENTRIES * _CPUID_BYTES, _CPUID_BYTES),
            msrs=fields.content("msrs", 0, MOST_MSRS * _MSR_BYTES, _MSR_BYTES),
            tsc=fields.integer("tsc"),
            tsc_offset=fields.integer_or_none("tsc_offset"),
            tsc_deadline=fields.integer_or_none("tsc_deadline"),
            events=fields.exactly("events", ctypes.sizeof(KvmVcpuEvents)),
        )
        for index, _ in state.msr_values():
            if index not in ALLOWED:
                raise fields.refuse("msrs", "registers of a saved vCPU", f"MSR {index:#x}")
        return state

    def encode(self) -> bytes:
        """The section."""
        return encode({attribute.name: getattr(self, attribute.name) for attribute in attrs.fields(type(self))})

    def msr_values(self) -> list[tuple[int, int]]:
        """Index and value of each register."""
        return [(index, value) for index, _, value in _MSR.iter_unpack(self.msrs)]


def save_vcpu(fd: int, host: HostState | None = None) -> bytes:
    """The section of a vCPU that does not run. Raises KvmIoctlError."""
    return read_vcpu(fd, host or host_state()).encode()


def read_vcpu(fd: int, host: HostState) -> VcpuState:
    """The state of a vCPU that does not run; every vCPU of the VM must stand still. Raises KvmIoctlError."""
    mp_state = KvmMpState()
    ioctl(fd, Request.KVM_GET_MP_STATE, mp_state)
    regs, sregs = _get(fd, Request.KVM_GET_REGS, KvmRegs()), _get(fd, Request.KVM_GET_SREGS, KvmSregs())
    if host.is_tcg:
        sregs = without_busy(sregs)
    xsave = _get_xsave(fd, host)
    xcrs = _get(fd, Request.KVM_GET_XCRS, KvmXcrs()) if host.has_xcrs else None
    debugregs = _get(fd, Request.KVM_GET_DEBUGREGS, KvmDebugregs())
    clocks = dict(_get_msrs(fd, (IA32_TIME_STAMP_COUNTER, IA32_TSC_DEADLINE)))
    lapic = _get(fd, Request.KVM_GET_LAPIC, KvmLapicState())
    tsc, deadline = clocks.get(IA32_TIME_STAMP_COUNTER, 0), clocks.get(IA32_TSC_DEADLINE)
    offset, tsc_khz = offset_by_attribute(fd), ioctl(fd, Request.KVM_GET_TSC_KHZ)
    table = KvmCpuid2(nent=MAX_CPUID_ENTRIES)
    ioctl(fd, Request.KVM_GET_CPUID2, table)
    cpuid = bytes(table)[8 : 8 + table.nent * _CPUID_BYTES]
    return VcpuState(
        mp_state=mp_state.mp_state,
        regs=regs,
        sregs=sregs,
        xsave=xsave,
        xcrs=xcrs,
        debugregs=debugregs,
        lapic=keep_tick(lapic),
        tsc_khz=tsc_khz,
        cpuid=cpuid,
        msrs=_packed(_get_msrs(fd, _indices(host, cpuid))),
        tsc=tsc,
        tsc_offset=None if offset is None else offset.low & U64_MOST,
        tsc_deadline=None if deadline is None else keep_deadline(lapic, deadline, tsc),
        events=_get(fd, Request.KVM_GET_VCPU_EVENTS, KvmVcpuEvents()),
    )


def _get(fd: int, request: Request, structure: ctypes.Structure) -> bytes:
    ioctl(fd, request, structure)
    return bytes(structure)


def _get_xsave(fd: int, host: HostState) -> bytes:
    area = ctypes.create_string_buffer(host.xsave_bytes)
    request = Request.KVM_GET_XSAVE2 if host.xsave2 else Request.KVM_GET_XSAVE
    ioctl(fd, request, ctypes.addressof(area))
    return area.raw


def _get_msrs(fd: int, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Those that the vCPU has: KVM_GET_MSRS stops at the first that it has not, and is asked on behind it."""
    found: list[tuple[int, int]] = []
    while indices:
        asked = indices[:MOST_MSRS]
        entries = b"".join([_MSR.pack(index, 0, 0) for index in asked])
        batch = ctypes.create_string_buffer(len(asked).to_bytes(_HEADER_BYTES, "little") + entries)
        done = ioctl(fd, Request.KVM_GET_MSRS, ctypes.addressof(batch))
        got = memoryview(batch)[_HEADER_BYTES : _HEADER_BYTES + done * _MSR_BYTES]
        found += [(index, value) for index, _, value in _MSR.iter_unpack(got)]
        indices = indices[done + (done < len(asked)) :]
    return found


def _packed(values: Sequence[tuple[int, int]]) -> bytes:
    return b"".join([_MSR.pack(index, 0, value) for index, value in values if not is_at_reset(index, value)])


@lru_cache(16)
def _indices(host: HostState, cpuid: bytes) -> tuple[int, ...]:
    return msr_indices(host.msrs, _entries(cpuid))


def _entries(cpuid: bytes) -> tuple[CpuidEntry, ...]:
    entries = (KvmCpuidEntry2 * (len(cpuid) // _CPUID_BYTES)).from_buffer_copy(cpuid)
    return tuple(CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries)
