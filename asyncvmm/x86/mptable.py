"""MP floating pointer and configuration table, and the command line that names virtio-mmio devices: both for kernels
built without ACPI.

Facts: Intel MultiProcessor Specification 1.4, chapter 4; Linux virtio_mmio.c (``virtio_mmio.device=``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from asyncvmm.x86.checksum import with_checksum
from asyncvmm.x86.layout import IOAPIC_ADDRESS, IOAPIC_PINS, KIB, LAPIC_ADDRESS, MP_TABLE_ADDRESS, MmioDevice

_FLOATING = struct.Struct("<4sIBBBBI")
_CONFIG = struct.Struct("<4sHBB8s12sIHHIHBB")
_PROCESSOR = struct.Struct("<BBBBIIQ")
_BUS = struct.Struct("<BB6s")
_IOAPIC = struct.Struct("<BBBBI")
_INTERRUPT = struct.Struct("<BBHBBBB")

_SPEC_REVISION = 4
_APIC_VERSION = 0x14
_IOAPIC_VERSION = 0x11
_ENABLED = 1
_BOOT_PROCESSOR = 2
_CPU_SIGNATURE = 0x600
_CPU_FEATURES = 0x201
"""FPU and APIC."""
_INT, _NMI, _EXTINT = 0, 1, 3
_ALL_APICS = 0xFF
_CASCADE = 2
"""The line on which the second 8259 hangs: no device can use it."""


def mp_tables(vcpus: int) -> bytes:
    """Floating pointer and configuration table, to stand at MP_TABLE_ADDRESS, for APIC IDs 0..vcpus-1."""
    floating = _FLOATING.pack(b"_MP_", MP_TABLE_ADDRESS + _FLOATING.size, 1, _SPEC_REVISION, 0, 0, 0)
    return with_checksum(floating, 10) + with_checksum(_configuration(_entries(vcpus)), 7)


def virtio_mmio_cmdline(devices: Sequence[MmioDevice]) -> str:
    """The command line words that make Linux probe these devices (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)."""
    return " ".join(f"virtio_mmio.device={device.size // KIB}K@{device.address:#x}:{device.gsi}" for device in devices)


def _configuration(entries: Sequence[bytes]) -> bytes:
    body = b"".join(entries)
    length = _CONFIG.size + len(body)
    return (
        _CONFIG.pack(
            b"PCMP",
            length,
            _SPEC_REVISION,
            0,
            b"ASYNCVMM",
            b"MICROVM".ljust(12),
            0,
            0,
            len(entries),
            LAPIC_ADDRESS,
            0,
            0,
            0,
        )
        + body
    )


def _entries(vcpus: int) -> list[bytes]:
    ioapic_id = vcpus
    entries = [_processor(apic_id) for apic_id in range(vcpus)]
    entries.append(_BUS.pack(1, 0, b"ISA".ljust(6)))
    entries.append(_IOAPIC.pack(2, ioapic_id, _IOAPIC_VERSION, _ENABLED, IOAPIC_ADDRESS))
    lines = [line for line in range(IOAPIC_PINS) if line != _CASCADE]
    entries += [_INTERRUPT.pack(3, _INT, 0, 0, line, ioapic_id, line) for line in lines]
    entries.append(_INTERRUPT.pack(4, _EXTINT, 0, 0, 0, 0, 0))
    entries.append(_INTERRUPT.pack(4, _NMI, 0, 0, 0, _ALL_APICS, 1))
    return entries


def _processor(apic_id: int) -> bytes:
    flags = _ENABLED | (_BOOT_PROCESSOR if apic_id == 0 else 0)
    return _PROCESSOR.pack(0, apic_id, _APIC_VERSION, flags, _CPU_SIGNATURE, _CPU_FEATURES, 0)
