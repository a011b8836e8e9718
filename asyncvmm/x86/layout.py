"""Where everything lies in the guest: physical addresses, I/O ports, interrupt lines, the e820 map.

Addresses follow the usual microVM map: boot tables below 640 KiB, ACPI and MP tables in the BIOS area that Linux
scans (ACPI 6.5, 5.2.5.1; MP specification 1.4, chapter 4), the kernel from 1 MiB, device registers in a hole below
4 GiB. Sizes and addresses are bytes.
"""

from __future__ import annotations

import attrs

from asyncvmm.errors import ConfigError, MemorySizeError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4 * KIB

# Below 1 MiB.
GDT_ADDRESS = 0x500
IDT_ADDRESS = 0x520
PVH_START_INFO = 0x6000
PVH_MODLIST = 0x6040
PVH_MEMMAP = 0x6080
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000
"""PML4, then PDPT, then one page directory for each GiB of RAM below the hole (at most three)."""
CMDLINE_ADDRESS = 0x20000
CMDLINE_MAX = 2048
"""Room for the kernel command line with its NUL."""
LOW_RAM_END = 0x9FC00
RSDP_ADDRESS = 0xE0000
ACPI_AREA_END = 0xEF000
VM_GENERATION_ADDRESS = 0xEF000
"""The VM generation ID, in a page of its own."""
VM_GENERATION_BYTES = 16
MP_TABLE_ADDRESS = 0xF0000
RESET_VECTOR = 0xFFFF0
"""F000:FFF0, where a restart that does not know better jumps to in real mode."""
BIOS_AREA_END = 0x100000

KERNEL_ADDRESS = 0x100000
"""Where a bzImage's protected-mode part goes, and the lowest address an ELF kernel may claim."""

# The 32-bit hole.
HOLE_START = 0xC0000000
HOLE_END = 1 << 32
MMIO_BASE = 0xC0001000
MMIO_SIZE = 0x1000
IOAPIC_ADDRESS = 0xFEC00000
LAPIC_ADDRESS = 0xFEE00000
IDENTITY_MAP_ADDRESS = 0xFFFBC000
"""For KVM_SET_IDENTITY_MAP_ADDR: one page."""
TSS_ADDRESS = 0xFFFBD000
"""For KVM_SET_TSS_ADDR: three pages."""

# Interrupt lines (GSI = IOAPIC pin, as KVM routes them).
MMIO_FIRST_GSI = 5
MMIO_LAST_GSI = 23
IOAPIC_PINS = 24

# I/O ports.
COM1_PORT = 0x3F8
COM1_GSI = 4
COM2_PORT = 0x2F8
COM2_GSI = 3
SERIAL_PORT_SIZE = 8
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64
RTC_INDEX_PORT = 0x70
RTC_DATA_PORT = 0x71
DEBUG_EXIT_PORT = 0xF4

ACPI_SLEEP_CONTROL_PORT = 0x600
"""SLEEP_CONTROL_REG (ACPI 6.5, 4.8.3.7). A byte written with ACPI_SLEEP_ENABLE set enters the state in bits 4:2."""
ACPI_SLEEP_STATUS_PORT = 0x601
"""SLEEP_STATUS_REG: WAK_STS is bit 7, written 1 to clear. Always reads 0 here: the machine never wakes."""
ACPI_RESET_PORT = 0x602
"""RESET_REG: writing ACPI_RESET_VALUE resets the machine."""
ACPI_EVENT_PORT = 0x603
"""Pending events, for the GED's _EVT: a byte read returns them and clears them. Bit 0 is the power button, bit 1 a new
VM generation ID. ACPI_HEED_GENERATION written here says that a driver looks at that one.
"""
ACPI_EVENT_GSI = 1
"""The GED's edge-triggered line: pulse it after setting an event bit. Free, because there is no keyboard."""

ACPI_SLEEP_ENABLE = 0x20
ACPI_SLEEP_TYPE_SHIFT = 2
ACPI_SLEEP_TYPE_MASK = 0x1C
ACPI_SLEEP_TYPE_S5 = 5
ACPI_RESET_VALUE = 0x01
ACPI_EVENT_POWER_BUTTON = 0x01
ACPI_EVENT_GENERATION = 0x02
ACPI_HEED_GENERATION = 0x01

E820_RAM = 1
E820_RESERVED = 2


@attrs.frozen
class Region:
    """A range of guest-physical addresses."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.start + self.size


@attrs.frozen
class E820Entry:
    """One range of the memory map handed to the kernel; ``type`` is E820_RAM or E820_RESERVED."""

    start: int
    size: int
    type: int


@attrs.frozen
class MmioDevice:
    """Where one virtio-mmio device's registers are, and its interrupt line."""

    address: int
    gsi: int
    size: int = MMIO_SIZE


def mmio_device(slot: int) -> MmioDevice:
    """The place of the virtio-mmio device number ``slot`` (from 0). Raises ConfigError beyond the last line."""
    slots = MMIO_LAST_GSI - MMIO_FIRST_GSI + 1
    if not 0 <= slot < slots:
        raise ConfigError("virtio-mmio slot", expected=f"0 to {slots - 1}", found=slot)
    return MmioDevice(MMIO_BASE + slot * MMIO_SIZE, MMIO_FIRST_GSI + slot)


def ram_regions(memory_bytes: int) -> tuple[Region, ...]:
    """Guest RAM of that size: from 0 up to the 32-bit hole, what is left from 4 GiB on.

    Raises MemorySizeError for less than 2 MiB or for a broken page.
    """
    if memory_bytes < 2 * MIB:
        raise MemorySizeError("guest memory", expected=f"at least {2 * MIB} bytes", found=f"{memory_bytes} bytes")
    if memory_bytes % PAGE_SIZE:
        raise MemorySizeError("guest memory", expected=f"a multiple of {PAGE_SIZE} bytes", found=memory_bytes)
    if memory_bytes <= HOLE_START:
        return (Region(0, memory_bytes),)
    return (Region(0, HOLE_START), Region(HOLE_END, memory_bytes - HOLE_START))


def e820_map(memory_bytes: int) -> tuple[E820Entry, ...]:
    """The memory map for that much RAM, sorted and without overlaps. The BIOS area, which holds our tables, is
    reserved. Raises MemorySizeError as ``ram_regions`` does."""
    first, *rest = ram_regions(memory_bytes)
    return (
        E820Entry(0, LOW_RAM_END, E820_RAM),
        E820Entry(LOW_RAM_END, BIOS_AREA_END - LOW_RAM_END, E820_RESERVED),
        E820Entry(BIOS_AREA_END, first.end - BIOS_AREA_END, E820_RAM),
        *(E820Entry(region.start, region.size, E820_RAM) for region in rest),
    )
