from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from asyncvmm.x86.layout import ACPI_RESET_PORT, ACPI_RESET_VALUE, BIOS_AREA_END, RESET_VECTOR
from asyncvmm.x86.reset_vector import reset_vector

KIB_64 = 0x10000


def test_the_reset_vector_fits_below_one_mib() -> None:
    assert RESET_VECTOR + len(reset_vector()) <= BIOS_AREA_END


@pytest.mark.requires("qemu")
def test_a_processor_that_starts_at_the_reset_vector_writes_the_reset_register(tmp_path: Path) -> None:
    bios = tmp_path / "bios"
    bios.write_bytes(bytes(KIB_64 - 16) + reset_vector().ljust(16, b"\0"))
    exit_device = f"isa-debug-exit,iobase={ACPI_RESET_PORT:#x},iosize=1"
    options = ["-M", "isapc", "-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", "-bios", str(bios)]
    done = subprocess.run(["qemu-system-x86_64", *options, "-device", exit_device], timeout=60, check=False)
    assert done.returncode == ACPI_RESET_VALUE << 1 | 1
