"""From what was asked for to what to boot: image files, command line, the workload's archive. Blocking."""

from __future__ import annotations

from asyncvmm.config import VMConfig, check_cmdline
from asyncvmm.errors import ConfigError
from asyncvmm.guest.archive import workload_archive
from asyncvmm.guest.cmdline import default_cmdline
from asyncvmm.guest.store import find_image
from asyncvmm.machine.base import AccelName, BootPlan


def make_plan(config: VMConfig, name: str, accel: AccelName, tsc_khz: int | None) -> BootPlan:
    """Decide what to boot. Reads the image's manifest. Raises ConfigError and its kinds."""
    if config.kernel is None and config.initrd is not None:
        raise ConfigError("initrd", expected="a kernel beside it", found="none")
    kernel, initrd = config.kernel, config.initrd
    if kernel is None:
        image = find_image(config.image)
        kernel, initrd = image.kernel, image.initrd
    if config.workload and initrd is None:
        raise ConfigError("workload", expected="an initrd with PID 1 in it", found="no initrd")
    cmdline = default_cmdline(accel) if config.cmdline is None else config.cmdline
    check_cmdline(cmdline)
    plan = BootPlan(
        name=name,
        memory_mib=config.memory_mib,
        vcpus=config.vcpus,
        kernel=kernel,
        initrd=initrd,
        appended=workload_archive(config.workload, config.env),
        cmdline=cmdline,
        tsc_khz=tsc_khz,
    )
    if accel == "qemu":  # our own machine checks as it loads; QEMU would start, and fail in words of its own or hang
        from asyncvmm.machine.assets import check_bootable  # with it comes all of x86, which KVM's users get later

        check_bootable(plan)
    return plan
