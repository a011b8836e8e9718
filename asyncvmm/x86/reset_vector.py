"""What stands where a PC's BIOS begins: a few real-mode instructions that reset the machine.

Linux on hardware-reduced ACPI restarts by EFI and, without EFI, by jumping to F000:FFF0 in real mode, past the reset
register of the FADT (``reboot_init`` in arch/x86/kernel/reboot.c). The code writes that register.
"""

from __future__ import annotations

import struct

from asyncvmm.x86.layout import ACPI_RESET_PORT, ACPI_RESET_VALUE


def reset_vector() -> bytes:
    """Code to stand at RESET_VECTOR, 16 bytes at most: ``mov dx, port; mov al, value; out dx, al; hlt; jmp $-1``."""
    return struct.pack("<BHBB", 0xBA, ACPI_RESET_PORT, 0xB0, ACPI_RESET_VALUE) + b"\xee\xf4\xeb\xfd"
