"""From a BootPlan to the blueprint of a VM that is ready to enter its kernel. Blocking; a worker thread's work.

Files are read and the whole layout is decided before a VM is created: what cannot be booted is refused with nothing
started.
"""

from __future__ import annotations

from contextlib import ExitStack

import attrs

from asyncvmm.machine.assets import check_host_memory, initrd_bytes, open_initrd, padded, read_kernel
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.contents import Contents
from asyncvmm.machine.kvm.creation import Blueprint, blueprint
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.layout import mmio_device
from asyncvmm.x86.load import BootLayout, Segment, plan_boot


@attrs.frozen(eq=False)
class Prepared:
    """A VM that can be created, and the open files that it is to be loaded from."""

    blueprint: Blueprint
    files: ExitStack

    def close(self) -> None:
        """Close the files. May be called again."""
        self.files.close()


def prepare(plan: BootPlan, timeline: Timeline) -> Prepared:
    """Read and check all that the VM is to be made of.

    Raises KernelError, InitrdError, CmdlineError, MemorySizeError, VcpuCountError, HostError.
    """
    memory_bytes = plan.memory_mib << 20
    check_host_memory(memory_bytes)
    with ExitStack() as files:
        with timeline.phase("kernel_asset_read"):
            kernel = read_kernel(plan.kernel)
        with timeline.phase("rootfs_asset_open"):
            initrd, initrd_size = open_initrd(plan.initrd, files)
        with timeline.phase("layout"):
            count = plan.devices.count
            layout = plan_boot(
                kernel,
                initrd_bytes(plan, initrd_size),
                plan.cmdline,
                memory_bytes,
                plan.vcpus,
                acpi=plan.acpi,
                mmio_devices=[mmio_device(slot) for slot in range(count)],
            )
            contents, ring = _contents(layout, initrd, initrd_size, plan.appended), None
            if plan.track_dirty:
                from asyncvmm.machine.kvm.ring_shape import ring_shape

                ring = ring_shape(memory_bytes, plan.ring_bytes)
            made = blueprint(memory_bytes, plan.vcpus, contents, devices=count, track_dirty=plan.track_dirty, ring=ring)
            return Prepared(made, files.pop_all())


def _contents(layout: BootLayout, fd: int, size: int, appended: bytes) -> Contents:
    contents = Contents(layout.cpu, layout.kernel, parameters=layout.parameters)
    address = layout.initrd_address
    if address is None:
        return contents
    behind = (Segment(address + padded(size), appended),) if appended else ()
    return attrs.evolve(contents, appended=behind, initrd_fd=fd, initrd_address=address, initrd_size=size)
