"""The ACPI tables of a machine without legacy hardware: RSDP, XSDT, FADT, MADT, DSDT.

Facts: ACPI 6.5 (chapter 5: tables; 4.1: hardware-reduced ACPI; 5.6.9: generic event device), Microsoft's "Virtual
Machine Generation ID" (a device whose ADDR gives the ID's address, and notification 0x80). What Linux insists on:
S5 needs ``_S5_`` and both sleep registers; a reset needs RESET_REG_SUP; without the 8042 flag and with NO_CMOS_RTC the
kernel probes for neither; COM1's interrupt must be spelled out, for there are no legacy interrupts to default to.
There is no interrupt source override for line 0: KVM routes GSIs to IOAPIC pins one to one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate

from asyncvmm.x86 import aml
from asyncvmm.x86.checksum import with_checksum
from asyncvmm.x86.layout import (
    ACPI_EVENT_GENERATION,
    ACPI_EVENT_GSI,
    ACPI_EVENT_PORT,
    ACPI_EVENT_POWER_BUTTON,
    ACPI_HEED_GENERATION,
    ACPI_RESET_PORT,
    ACPI_RESET_VALUE,
    ACPI_SLEEP_CONTROL_PORT,
    ACPI_SLEEP_STATUS_PORT,
    ACPI_SLEEP_TYPE_S5,
    COM1_GSI,
    COM1_PORT,
    IOAPIC_ADDRESS,
    LAPIC_ADDRESS,
    RSDP_ADDRESS,
    SERIAL_PORT_SIZE,
    VM_GENERATION_ADDRESS,
    MmioDevice,
)

_OEM_ID = b"ASYNCV"
_OEM_TABLE_ID = b"MICROVM "
_CREATOR_ID = b"AVMM"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_OFFSET = 9
_RSDP = struct.Struct("<8sB6sBIIQB3s")
_RSDP_V1_SIZE = 20
_GENERIC_ADDRESS = struct.Struct("<BBBBQ")
_TABLE_ALIGNMENT = 16

_FADT_SIZE = 276
_FADT_REVISION = 6
_FADT_MINOR = 3
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_PWR_BUTTON = 1 << 4
_SLP_BUTTON = 1 << 5
_FIX_RTC = 1 << 6
_RESET_REG_SUP = 1 << 10
_HEADLESS = 1 << 12
_HW_REDUCED_ACPI = 1 << 20
_FADT_FLAGS = _WBINVD | _PROC_C1 | _PWR_BUTTON | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP | _HEADLESS | _HW_REDUCED_ACPI
"""PWR_BUTTON, SLP_BUTTON and FIX_RTC say that there is *no* such fixed hardware."""
_VGA_NOT_PRESENT = 1 << 2
_NO_CMOS_RTC = 1 << 5

_POWER_BUTTON_PRESSED = 0x80
_GENERATION_CHANGED = 0x80


def acpi_tables(vcpus: int, devices: Sequence[MmioDevice] = ()) -> bytes:
    """All tables for APIC IDs 0..vcpus-1 and these virtio-mmio devices, as one block to stand at RSDP_ADDRESS.

    The RSDP is its start: there the kernel's own scan finds it, and that is the address to hand over.
    """
    dsdt_table, madt_table = dsdt(devices), madt(vcpus)
    sizes = (_RSDP.size, _HEADER.size + 2 * 8, len(dsdt_table), _FADT_SIZE)
    xsdt_at, dsdt_at, fadt_at, madt_at = (RSDP_ADDRESS + end for end in accumulate(map(_aligned, sizes)))
    tables = (rsdp(xsdt_at), xsdt([fadt_at, madt_at]), dsdt_table, fadt(dsdt_at), madt_table)
    return b"".join(table.ljust(_aligned(len(table)), b"\0") for table in tables)


def rsdp(xsdt_address: int) -> bytes:
    """Root System Description Pointer, revision 2 (ACPI 6.5, 5.2.5.3)."""
    table = _RSDP.pack(b"RSD PTR ", 0, _OEM_ID, 2, 0, _RSDP.size, xsdt_address, 0, b"")
    first = with_checksum(table[:_RSDP_V1_SIZE], 8)
    return with_checksum(first + table[_RSDP_V1_SIZE:], 32)


def xsdt(addresses: Sequence[int]) -> bytes:
    """Extended System Description Table: where the other tables are."""
    return _table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def fadt(dsdt_address: int) -> bytes:
    """Fixed ACPI Description Table for hardware-reduced ACPI (ACPI 6.5, 5.2.9)."""
    table = bytearray(_FADT_SIZE)
    struct.pack_into("<H", table, 109, _VGA_NOT_PRESENT | _NO_CMOS_RTC)
    struct.pack_into("<I", table, 112, _FADT_FLAGS)
    table[116:128] = _io_register(ACPI_RESET_PORT)
    table[128] = ACPI_RESET_VALUE
    table[131] = _FADT_MINOR
    struct.pack_into("<Q", table, 140, dsdt_address)
    table[244:256] = _io_register(ACPI_SLEEP_CONTROL_PORT)
    table[256:268] = _io_register(ACPI_SLEEP_STATUS_PORT)
    table[268:276] = b"ASYNCVMM"
    return _table(b"FACP", _FADT_REVISION, bytes(table[_HEADER.size :]))


def madt(vcpus: int) -> bytes:
    """Multiple APIC Description Table (ACPI 6.5, 5.2.12): a local APIC for each vCPU, the IOAPIC, NMI on LINT1."""
    local_apics = b"".join(struct.pack("<BBBBI", 0, 8, vcpu, vcpu, 1) for vcpu in range(vcpus))
    ioapic = struct.pack("<BBBBII", 1, 12, vcpus, 0, IOAPIC_ADDRESS, 0)
    nmi = struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return _table(b"APIC", 5, struct.pack("<II", LAPIC_ADDRESS, 0) + local_apics + ioapic + nmi)


def dsdt(devices: Sequence[MmioDevice] = ()) -> bytes:
    """Differentiated System Description Table: S5, COM1, the event device with power button and VM generation ID,
    virtio-mmio.

    COM2 is not in it: the control line is not the kernel's.
    """
    s5 = aml.package(aml.integer(ACPI_SLEEP_TYPE_S5), *[aml.integer(0)] * 3)
    virtio = [_virtio_mmio(index, device) for index, device in enumerate(devices)]
    system_bus = aml.scope("\\_SB_", _com1(), _power_button(), _event_device(), _generation(), *virtio)
    return _table(b"DSDT", 2, aml.name("\\_S5_", s5) + system_bus)


def _com1() -> bytes:
    resources = aml.resource_template(aml.io_ports(COM1_PORT, SERIAL_PORT_SIZE), aml.interrupt(COM1_GSI))
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", resources),
    )


def _power_button() -> bytes:
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")))


def _event_device() -> bytes:
    events = aml.name_path("EVTS")
    pressed = aml.bit_and(aml.LOCAL0, aml.integer(ACPI_EVENT_POWER_BUTTON))
    changed = aml.bit_and(aml.LOCAL0, aml.integer(ACPI_EVENT_GENERATION))
    return aml.device(
        "GED_",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(aml.interrupt(ACPI_EVENT_GSI))),
        aml.system_io_field("EVTR", ACPI_EVENT_PORT, "EVTS"),
        aml.method(
            "_EVT",
            1,
            aml.store(events, aml.LOCAL0),
            aml.if_(pressed, aml.notify("\\_SB_.PWRB", _POWER_BUTTON_PRESSED)),
            aml.if_(changed, aml.notify("\\_SB_.VGEN", _GENERATION_CHANGED)),
            serialized=True,
        ),
    )


def _generation() -> bytes:
    """Who asks for the address will look there: the host hears of it, and writes nothing into guests that do not."""
    heed = aml.store(aml.integer(ACPI_HEED_GENERATION), aml.name_path("\\_SB_.GED_.EVTS"))
    address = aml.package(aml.integer(VM_GENERATION_ADDRESS), aml.integer(0))
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("AVMM0001")),
        aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.method("ADDR", 0, heed, aml.return_(address), serialized=True),
    )


def _virtio_mmio(index: int, device: MmioDevice) -> bytes:
    resources = aml.resource_template(aml.memory32_fixed(device.address, device.size), aml.interrupt(device.gsi))
    return aml.device(
        f"V{index:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", resources),
    )


def _io_register(port: int) -> bytes:
    """A Generic Address Structure for a byte-wide I/O port."""
    return _GENERIC_ADDRESS.pack(aml.SYSTEM_IO, 8, 0, 1, port)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1)
    return with_checksum(header + body, _CHECKSUM_OFFSET)


def _aligned(size: int) -> int:
    return -(-size // _TABLE_ALIGNMENT) * _TABLE_ALIGNMENT
