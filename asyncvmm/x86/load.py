"""Decides where everything goes in guest memory before anything is started: the boot plan of one kernel.

Facts: Linux Documentation/arch/x86/boot.rst (bzImage, 64-bit protocol), Xen's PVH ABI; addresses from ``layout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import attrs

from asyncvmm.config import MAX_VCPUS, check_cmdline
from asyncvmm.errors import CmdlineError, InitrdError, MemorySizeError, VcpuCountError
from asyncvmm.x86.acpi import acpi_tables
from asyncvmm.x86.boot_params import BootParams, zero_page
from asyncvmm.x86.bzimage import BzImage
from asyncvmm.x86.cpu import BootCpu, gdt, long_mode_cpu, pvh_cpu
from asyncvmm.x86.elf import ElfKernel
from asyncvmm.x86.kernel import inspect_kernel
from asyncvmm.x86.layout import (
    CMDLINE_ADDRESS,
    CMDLINE_MAX,
    GDT_ADDRESS,
    KERNEL_ADDRESS,
    MP_TABLE_ADDRESS,
    PAGE_SIZE,
    PAGE_TABLES,
    PVH_START_INFO,
    RESET_VECTOR,
    RSDP_ADDRESS,
    ZERO_PAGE,
    MmioDevice,
    Region,
    e820_map,
    ram_regions,
)
from asyncvmm.x86.mptable import mp_tables, virtio_mmio_cmdline
from asyncvmm.x86.paging import identity_page_tables
from asyncvmm.x86.pvh import start_info
from asyncvmm.x86.reset_vector import reset_vector

Protocol = Literal["bzimage", "pvh", "elf64"]

ELF_INITRD_ADDR_MAX = 0x7FFFFFFF
"""What x86-64 kernels write into their bzImage header; a vmlinux has no place to say it."""


@attrs.frozen
class Segment:
    """Bytes to be copied to guest-physical ``address``."""

    address: int
    data: bytes | memoryview = attrs.field(repr=False)

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.address + len(self.data)


@attrs.frozen(kw_only=True)
class BootLayout:
    """A kernel's boot, decided: the kernel's segments, and the parameters that its boot protocol and firmware tables
    want in memory. They do not overlap and lie in the first RAM region; memory outside them must read as zeros. The
    initrd is not among them: copy it to ``initrd_address`` (None without one)."""

    protocol: Protocol
    kernel: tuple[Segment, ...]
    parameters: tuple[Segment, ...]
    initrd_address: int | None
    cpu: BootCpu
    cmdline: str
    rsdp_address: int | None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All that is to be copied."""
        return (*self.parameters, *self.kernel)


@attrs.frozen(kw_only=True)
class _Placed:
    """A kernel with its place: what all protocols have in common."""

    protocol: Protocol
    entry: int
    header: bytes | None
    segments: tuple[Segment, ...]
    area: Region
    initrd_addr_max: int
    cmdline_size: int


def plan_boot(
    kernel_image: bytes | memoryview,
    initrd_size: int,
    cmdline: str,
    memory_bytes: int,
    vcpus: int,
    *,
    acpi: bool = True,
    mmio_devices: Sequence[MmioDevice] = (),
    prefer_pvh: bool = True,
) -> BootLayout:
    """Plan the boot of ``kernel_image`` (the whole file; the plan holds views of it, no copies).

    ``initrd_size`` is in bytes, 0 for none. Without ``acpi`` the virtio-mmio devices are named on the command line
    instead. An MP table is there in either case: kernels with ACPI ignore it. ``prefer_pvh`` False boots a vmlinux by
    the 64-bit protocol even if it has a PVH note.

    Raises KernelError, MemorySizeError (the kernel needs more), InitrdError, CmdlineError, VcpuCountError.
    """
    if not 1 <= vcpus <= MAX_VCPUS:
        raise VcpuCountError("vCPUs", expected=f"1 to {MAX_VCPUS}", found=vcpus)
    ram = ram_regions(memory_bytes)[0]
    kernel = _placed(inspect_kernel(kernel_image), prefer_pvh)
    if kernel.area.end > ram.end:
        expected = f"at least {kernel.area.end} bytes for this kernel"
        raise MemorySizeError("guest memory", expected=expected, found=f"{memory_bytes} bytes")
    initrd_address = _initrd_address(initrd_size, kernel, ram)
    text = cmdline if acpi else " ".join(filter(None, (cmdline, virtio_mmio_cmdline(mmio_devices))))
    params = BootParams(
        cmdline_address=CMDLINE_ADDRESS,
        cmdline_size=kernel.cmdline_size,
        e820=e820_map(memory_bytes),
        ramdisk_address=initrd_address or 0,
        ramdisk_size=initrd_size,
        rsdp_address=RSDP_ADDRESS if acpi else 0,
    )
    firmware = _firmware_segments(vcpus, tuple(mmio_devices) if acpi else None)
    return _boot_layout(kernel, params, ram, text, firmware)


def _boot_layout(
    kernel: _Placed, params: BootParams, ram: Region, cmdline: str, firmware: tuple[Segment, ...]
) -> BootLayout:
    cpu = pvh_cpu(kernel.entry) if kernel.protocol == "pvh" else long_mode_cpu(kernel.entry)
    return BootLayout(
        protocol=kernel.protocol,
        kernel=kernel.segments,
        parameters=(
            Segment(GDT_ADDRESS, gdt(cpu)),
            *_protocol_segments(kernel, params, ram),
            Segment(CMDLINE_ADDRESS, _cmdline_bytes(cmdline, kernel.cmdline_size)),
            *firmware,
        ),
        initrd_address=params.ramdisk_address or None,
        cpu=cpu,
        cmdline=cmdline,
        rsdp_address=params.rsdp_address or None,
    )


@lru_cache(maxsize=64)
def _firmware_segments(vcpus: int, acpi_devices: tuple[MmioDevice, ...] | None) -> tuple[Segment, ...]:
    """MP table and reset vector always, ACPI tables unless ``acpi_devices`` is None.

    Kept, because VMs of one shape have the same, and they are most of a plan's work.
    """
    common = (Segment(MP_TABLE_ADDRESS, mp_tables(vcpus)), Segment(RESET_VECTOR, reset_vector()))
    if acpi_devices is None:
        return common
    return Segment(RSDP_ADDRESS, acpi_tables(vcpus, acpi_devices)), *common


def _placed(kernel: BzImage | ElfKernel, prefer_pvh: bool) -> _Placed:
    if isinstance(kernel, BzImage):
        return _placed_bzimage(kernel)
    pvh = prefer_pvh and kernel.pvh_entry is not None
    return _Placed(
        protocol="pvh" if pvh else "elf64",
        entry=kernel.check_entry(pvh=pvh),
        header=None,
        segments=tuple(Segment(segment.address, segment.data) for segment in kernel.segments if segment.data),
        area=kernel.work_area,
        initrd_addr_max=ELF_INITRD_ADDR_MAX,
        cmdline_size=CMDLINE_MAX - 1,
    )


def _placed_bzimage(kernel: BzImage) -> _Placed:
    end = max(kernel.work_area.end, kernel.load_address + len(kernel.payload))
    return _Placed(
        protocol="bzimage",
        entry=kernel.entry,
        header=kernel.header,
        segments=(Segment(kernel.load_address, kernel.payload),),
        area=Region(KERNEL_ADDRESS, end - KERNEL_ADDRESS),
        initrd_addr_max=kernel.initrd_addr_max,
        cmdline_size=min(kernel.cmdline_size, CMDLINE_MAX - 1),
    )


def _initrd_address(size: int, kernel: _Placed, ram: Region) -> int | None:
    if size == 0:
        return None
    limit = min(ram.end, kernel.initrd_addr_max + 1)
    address = (limit - size) & ~(PAGE_SIZE - 1)
    if address < kernel.area.end:
        room = max(0, (limit & ~(PAGE_SIZE - 1)) - -(-kernel.area.end // PAGE_SIZE) * PAGE_SIZE)
        raise InitrdError("initrd", expected=f"at most {room} bytes beside the kernel", found=f"{size} bytes")
    return address


def _cmdline_bytes(text: str, limit: int) -> bytes:
    check_cmdline(text)
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > limit:
        raise CmdlineError("kernel command line", expected=f"at most {limit} bytes", found=f"{len(data)} bytes")
    return data + b"\0"


def _protocol_segments(kernel: _Placed, params: BootParams, ram: Region) -> tuple[Segment, ...]:
    if kernel.protocol == "pvh":
        info = start_info(
            cmdline_address=params.cmdline_address,
            memmap=params.e820,
            rsdp_address=params.rsdp_address,
            ramdisk_address=params.ramdisk_address,
            ramdisk_size=params.ramdisk_size,
        )
        return (Segment(PVH_START_INFO, info),)
    return (
        Segment(ZERO_PAGE, zero_page(params, kernel.header)),
        Segment(PAGE_TABLES, identity_page_tables(ram.end)),
    )
