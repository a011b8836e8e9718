"""A small kernel of our own configuration, as an ELF vmlinux: entered by PVH, and by the 64-bit boot protocol."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asyncvmm import VMConfig
from asyncvmm.guest.image import find_image
from asyncvmm.x86.load import plan_boot

if TYPE_CHECKING:
    from tests.lab.conftest import Live

WORKLOAD = ("sh", "-c", "echo cpus=$(grep -c ^processor /proc/cpuinfo); exit 3")
PT_NULL, PT_NOTE = 0, 4
PROTOCOLS = ("pvh", "elf64")


@pytest.fixture(params=PROTOCOLS)
def kernel(request: pytest.FixtureRequest, small_kernel: Path, tmp_path: Path) -> Path:
    """The kernel as it is, or without the note that offers PVH."""
    image = small_kernel.read_bytes() if request.param == "pvh" else without_notes(small_kernel.read_bytes())
    assert plan_boot(image, 0, "", 256 << 20, 1).protocol == request.param
    path = tmp_path / "vmlinux"
    path.write_bytes(image)
    return path


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_vmlinux_boots_and_runs_a_workload(live: Live, kernel: Path, vcpus: int) -> None:
    config = VMConfig(kernel=kernel, initrd=find_image().initrd, vcpus=vcpus, accel="kvm", workload=WORKLOAD)
    story = live(config)
    assert f"cpus={vcpus}\n" in story.console
    assert (story.code, story.end) == (3, "shutdown")


def test_without_acpi_devices_are_found_on_the_command_line(live: Live, small_kernel: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"found".ljust(1 << 20, b"\0"))
    config = VMConfig(
        kernel=small_kernel,
        initrd=find_image().initrd,
        accel="kvm",
        acpi=False,
        drives=[image],
        rng=True,
        workload=(
            "sh",
            "-c",
            "head -c 5 /dev/vda; grep -c virtio /proc/interrupts; test ! -e /sys/firmware/acpi/tables",
        ),
    )
    story = live(config)
    assert "found1\n" in story.console
    assert (story.code, story.end) == (0, "reset")


def without_notes(image: bytes) -> bytes:
    """An ELF file whose PT_NOTE program headers are void (ELF-64: e_phoff at 32, e_phnum at 56, 56 bytes each)."""
    patched = bytearray(image)
    (table,) = struct.unpack_from("<Q", image, 32)
    (count,) = struct.unpack_from("<H", image, 56)
    for header in range(table, table + 56 * count, 56):
        if struct.unpack_from("<I", image, header) == (PT_NOTE,):
            struct.pack_into("<I", patched, header, PT_NULL)
    return bytes(patched)
