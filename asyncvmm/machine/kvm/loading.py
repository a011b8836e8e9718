"""From a BootPlan to a VM that is ready to enter its kernel. Blocking; a worker thread's work.

Files are read and the whole layout is decided before /dev/kvm is opened: what cannot be booted is refused with nothing
started.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from asyncvmm.errors import InitrdError
from asyncvmm.machine.assets import check_host_memory, initrd_bytes, open_initrd, padded, read_kernel
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.load import BootLayout, plan_boot


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
        vm = KvmVm(memory_bytes, plan.vcpus, timeline)
        adopt(vm)
        with timeline.phase("rootfs_load"):
            _load_initrd(vm.memory, layout, initrd, initrd_size, plan.appended)
        with timeline.phase("kernel_load"):
            for segment in layout.segments:
                vm.memory.write(segment.address, segment.data)
        with timeline.phase("vcpu_config"):
            vm.configure(layout.cpu)


def _load_initrd(memory: GuestMemory, layout: BootLayout, fd: int, size: int, appended: bytes) -> None:
    address = layout.initrd_address
    if address is None:
        return
    try:
        read = memory.read_file(address, fd, size) if size else 0
    except OSError as failure:
        raise InitrdError("initrd", expected="a readable file", found=failure.strerror) from None
    if read != size:
        raise InitrdError("initrd", expected=f"{size} bytes, as when it was opened", found=f"{read} bytes")
    memory.write(address + padded(size), appended)
