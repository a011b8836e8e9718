"""Exits: the shared kvm_run page, decoded into typed values. No I/O; the page is any buffer.

Source: struct kvm_run in Documentation/virt/kvm/api.rst, section 5. Offsets are those of x86-64.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import attrs

KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_DIRTY_RING_FULL = 31

EXIT_NAMES = {
    0: "UNKNOWN",
    1: "EXCEPTION",
    KVM_EXIT_IO: "IO",
    3: "HYPERCALL",
    4: "DEBUG",
    KVM_EXIT_HLT: "HLT",
    KVM_EXIT_MMIO: "MMIO",
    7: "IRQ_WINDOW_OPEN",
    KVM_EXIT_SHUTDOWN: "SHUTDOWN",
    KVM_EXIT_FAIL_ENTRY: "FAIL_ENTRY",
    KVM_EXIT_INTR: "INTR",
    11: "SET_TPR",
    12: "TPR_ACCESS",
    16: "NMI",
    KVM_EXIT_INTERNAL_ERROR: "INTERNAL_ERROR",
    KVM_EXIT_SYSTEM_EVENT: "SYSTEM_EVENT",
    26: "IOAPIC_EOI",
    29: "X86_RDMSR",
    30: "X86_WRMSR",
    KVM_EXIT_DIRTY_RING_FULL: "DIRTY_RING_FULL",
    33: "X86_BUS_LOCK",
    37: "NOTIFY",
}

IMMEDIATE_EXIT = 1
"""Offset of kvm_run.immediate_exit, one byte."""
EXIT_REASON_WORD = 2
"""kvm_run.exit_reason as an index of 32-bit words."""
IO_KEY_WORD = 8
"""direction, size and port of a KVM_EXIT_IO together, as an index of 32-bit words: the key of port dispatch."""
IO_COUNT_WORD = 9
IO_DATA_OFFSET_QUAD = 5
"""kvm_run.io.data_offset as an index of 64-bit words."""
MMIO_DATA = 40

_IO = struct.Struct("<BBHIQ")
_MMIO = struct.Struct("<Q8sIB")
_FAIL_ENTRY = struct.Struct("<QI")
_INTERNAL = struct.Struct("<II")
_UNION = 32
_INTERNAL_DATA = _UNION + 8
KVM_INTERNAL_ERROR_EMULATION = 1
_EMULATION_HAS_BYTES = 1
_MOST_INSTRUCTION_BYTES = 15


def io_key(is_out: bool, size: int, port: int) -> int:
    """The 32-bit word a KVM_EXIT_IO shows at IO_KEY_WORD for this access."""
    return int(is_out) | (size << 8) | (port << 16)


@attrs.frozen
class IoExit:
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes at ``port``. ``data`` is what an OUT wrote; empty for an IN."""

    is_out: bool
    size: int
    port: int
    count: int
    data_offset: int
    data: bytes = b""


@attrs.frozen
class MmioExit:
    """KVM_EXIT_MMIO. ``data`` is what was written; empty for a read of ``size`` bytes."""

    is_write: bool
    address: int
    size: int
    data: bytes = b""


@attrs.frozen
class HltExit:
    """KVM_EXIT_HLT: HLT where the interrupt controller is not in the kernel."""


@attrs.frozen
class ShutdownExit:
    """KVM_EXIT_SHUTDOWN: a triple fault."""


@attrs.frozen
class FailEntryExit:
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state."""

    hardware_reason: int
    cpu: int


@attrs.frozen
class InternalErrorExit:
    """KVM_EXIT_INTERNAL_ERROR. ``instruction`` holds the bytes that could not be emulated, where KVM tells."""

    suberror: int
    instruction: bytes = b""

    @property
    def is_emulation_failure(self) -> bool:
        """Whether KVM's instruction emulator gave up."""
        return self.suberror == KVM_INTERNAL_ERROR_EMULATION


@attrs.frozen
class OtherExit:
    """Any reason without a class of its own."""

    reason: int

    @property
    def name(self) -> str:
        """The reason's name in the KVM API, or its number."""
        return EXIT_NAMES.get(self.reason, f"reason {self.reason}")


Exit = IoExit | MmioExit | HltExit | ShutdownExit | FailEntryExit | InternalErrorExit | OtherExit


def exit_name(reason: int) -> str:
    """``IO``, ``MMIO`` … for an exit reason."""
    return EXIT_NAMES.get(reason, f"reason {reason}")


def decode(run: memoryview) -> Exit:
    """The exit that stands in a kvm_run page (bytes view). Never raises for what the kernel writes there."""
    reason = int.from_bytes(run[8:12], "little")
    decoder = _DECODERS.get(reason)
    return decoder(run) if decoder else OtherExit(reason)


def _decode_io(run: memoryview) -> IoExit:
    direction, size, port, count, offset = _IO.unpack_from(run, _UNION)
    data = bytes(run[offset : offset + size * count]) if direction else b""
    return IoExit(bool(direction), size, port, count, offset, data)


def _decode_mmio(run: memoryview) -> MmioExit:
    address, data, size, is_write = _MMIO.unpack_from(run, _UNION)
    size = min(size, 8)
    return MmioExit(bool(is_write), address, size, data[:size] if is_write else b"")


def _decode_fail_entry(run: memoryview) -> FailEntryExit:
    return FailEntryExit(*_FAIL_ENTRY.unpack_from(run, _UNION))


def _decode_internal_error(run: memoryview) -> InternalErrorExit:
    suberror, count = _INTERNAL.unpack_from(run, _UNION)
    if suberror != KVM_INTERNAL_ERROR_EMULATION or count < 1:
        return InternalErrorExit(suberror)
    flags = int.from_bytes(run[_INTERNAL_DATA : _INTERNAL_DATA + 8], "little")
    if not flags & _EMULATION_HAS_BYTES or count < 3:
        return InternalErrorExit(suberror)
    size = min(run[_INTERNAL_DATA + 8], _MOST_INSTRUCTION_BYTES)
    return InternalErrorExit(suberror, bytes(run[_INTERNAL_DATA + 9 : _INTERNAL_DATA + 9 + size]))


_DECODERS: dict[int, Callable[[memoryview], Exit]] = {
    KVM_EXIT_IO: _decode_io,
    KVM_EXIT_HLT: lambda run: HltExit(),
    KVM_EXIT_MMIO: _decode_mmio,
    KVM_EXIT_SHUTDOWN: lambda run: ShutdownExit(),
    KVM_EXIT_FAIL_ENTRY: _decode_fail_entry,
    KVM_EXIT_INTERNAL_ERROR: _decode_internal_error,
}
