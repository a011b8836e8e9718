"""From a BootPlan to a VM that is ready to enter its kernel. Blocking; a worker thread's work.

Files are read and the whole layout is decided before /dev/kvm is opened: what cannot be booted is refused with nothing
started.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from asyncvmm.machine.assets import check_host_memory, initrd_bytes, open_initrd, padded, read_kernel
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.contents import Contents
from asyncvmm.machine.kvm.creation import blueprint
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout, Segment, plan_boot


def load(plan: BootPlan, timeline: Timeline, adopt: Callable[[KvmVm], None]) -> None:
    """Build and load the VM. ``adopt`` takes it over as soon as it exists, so that the caller can free it.

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
            layout = plan_boot(kernel, initrd_bytes(plan, initrd_size), plan.cmdline, memory_bytes, plan.vcpus)
        contents = _contents(layout, initrd, initrd_size, plan.appended)
        adopt(KvmVm(blueprint(memory_bytes, plan.vcpus, contents), timeline))


def _contents(layout: BootLayout, fd: int, size: int, appended: bytes) -> Contents:
    address = layout.initrd_address
    if address is None:
        return Contents(layout.cpu, layout.segments)
    behind = (Segment(address + padded(size), appended),) if appended else ()
    return Contents(layout.cpu, layout.segments, behind, fd, address, size)
