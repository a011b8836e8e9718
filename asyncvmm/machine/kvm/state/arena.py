"""All of a saved machine's state in one buffer, as KVM's structures, and where in it each one is.

KVM only reads it, so every VM that is restored from one snapshot is given the same buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.machine.kvm.abi import KvmClockData, KvmMpState, KvmMsrEntry
from asyncvmm.machine.kvm.state.msrs import IA32_TIME_STAMP_COUNTER, IA32_TSC_DEADLINE
from asyncvmm.machine.kvm.state.vcpu import VcpuState
from asyncvmm.machine.kvm.state.vm import VmState

_ALIGNMENT = 64


@attrs.frozen
class MsrBatch:
    """One KVM_SET_MSRS: where it is, and how many registers it is to set."""

    at: int
    count: int


@attrs.frozen(kw_only=True)
class VcpuPlaces:
    """Where a vCPU's structures are; None for what it has not."""

    cpuid: int
    mp_state: int
    regs: int
    sregs: int
    xsave: int
    xcrs: int | None
    debugregs: int
    lapic: int
    tsc: MsrBatch
    msrs: MsrBatch
    deadline: MsrBatch | None
    events: int


@attrs.frozen(kw_only=True)
class VmPlaces:
    """Where the VM's structures are; ``irqchips`` in the order of IRQCHIPS."""

    pit: int
    clock: int
    irqchips: tuple[int, ...]


class Arena:
    """A buffer being filled."""

    def __init__(self) -> None:
        self._data = bytearray()

    def content(self) -> bytes:
        """All of it."""
        return bytes(self._data)

    def add_vcpu(self, state: VcpuState, xsave_bytes: int) -> VcpuPlaces:
        """``xsave_bytes``: how much of an XSAVE area this host's KVM reads, however long the saved one is."""
        deadline = state.tsc_deadline
        return VcpuPlaces(
            cpuid=self._add_list(state.cpuid, len(state.cpuid) // 40),
            mp_state=self._add(bytes(KvmMpState(state.mp_state))),
            regs=self._add(state.regs),
            sregs=self._add(state.sregs),
            xsave=self._add(state.xsave.ljust(xsave_bytes, b"\0")),
            xcrs=None if state.xcrs is None else self._add(state.xcrs),
            debugregs=self._add(state.debugregs),
            lapic=self._add(state.lapic),
            tsc=self._add_msrs([(IA32_TIME_STAMP_COUNTER, state.tsc)]),
            msrs=self._add_msrs(state.msr_values()),
            deadline=None if deadline is None else self._add_msrs([(IA32_TSC_DEADLINE, deadline)]),
            events=self._add(state.events),
        )

    def add_vm(self, state: VmState) -> VmPlaces:
        """The clock goes in without flags: it is to go on from where it stood, on whatever host."""
        return VmPlaces(
            pit=self._add(state.pit),
            clock=self._add(bytes(KvmClockData(clock=state.clock))),
            irqchips=tuple(self._add(chip) for chip in state.irqchips()),
        )

    def _add_msrs(self, values: Sequence[tuple[int, int]]) -> MsrBatch:
        entries = b"".join(bytes(KvmMsrEntry(index, 0, value)) for index, value in values)
        return MsrBatch(self._add_list(entries, len(values)), len(values))

    def _add_list(self, entries: bytes, count: int) -> int:
        """Entries behind their number, as struct kvm_msrs and struct kvm_cpuid2 have them."""
        return self._add(count.to_bytes(8, "little") + entries)

    def _add(self, content: bytes) -> int:
        at = len(self._data)
        self._data += content
        self._data += bytes(-len(self._data) % _ALIGNMENT)
        return at
