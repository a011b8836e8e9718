"""The QEMU command line, decided by the plan alone. Pure: records in, words out.

The facts: qemu-system-x86_64(1); docs/system/i386/microvm.rst of QEMU; Linux' Documentation/admin-guide/
kernel-parameters.txt. What is not obvious in them:

- Linux finds COM1 and COM2 through ACPI, where QEMU lists the devices of a bus youngest first. With
  ``8250.nr_uarts=1`` the first one listed becomes ttyS0, so COM2 is created before COM1; the other way round the
  kernel's console ends up on the control line.
- Guest memory is always a file of ours (a memfd, or a snapshot's): QEMU leaves shared memory out of the state it saves,
  where it can be told to, and vhost-user needs it shared anyway. A boot takes no longer for it.
- A saved state brings kernel, initrd and firmware tables with it; QEMU wants none of them again.
- ``-S`` costs no round trip: ``cont`` is waiting in the QMP socket before QEMU exists (see qmp.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import attrs

from asyncvmm.config import check_cmdline
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.devices import DeviceEnds, Transport, device_words

QemuAccel = Literal["tcg", "kvm"]
MachineType = Literal["microvm", "q35"]

COM1 = (0x3F8, 4)
"""COM1's first port and its interrupt line."""

COM2 = (0x2F8, 3)
"""COM2's first port and its interrupt line."""

DEBUG_EXIT_PORT = 0xF4
"""A byte ``v`` written there ends QEMU with exit status ``v << 1 | 1``."""

RAM = "ram"
"""The id of the guest's memory, and what it is called in a saved state."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's own seccomp filter: no fork, no exec, no set*id for a guest that broke out."""


@attrs.frozen
class QemuBinary:
    """A QEMU that runs here. ``sandbox``: whether it was built with seccomp. ``host_cpu`` is what ``-cpu host`` shows
    its guests."""

    path: Path
    version: tuple[int, ...]
    sandbox: bool = True
    host_cpu: str = ""


@attrs.frozen
class MemoryEnd:
    """The file that is the guest's memory: its descriptor, and whether what the guest writes goes into it (``shared``)
    or stays this QEMU's."""

    fd: int
    shared: bool = True


@attrs.frozen(kw_only=True)
class ChildDescriptors:
    """Descriptor numbers that QEMU inherits: its ends of three stream sockets, the guest's memory, and what its devices
    stand on. ``restores``: a saved state is to come by QMP, and takes the kernel's place."""

    qmp: int
    console: int
    control: int
    memory: MemoryEnd
    devices: DeviceEnds = attrs.field(factory=DeviceEnds)
    restores: bool = False

    def all(self) -> list[int]:
        """Every one of them."""
        return [self.qmp, self.console, self.control, self.memory.fd, *self.devices.descriptors()]


def choose_machine_type(plan: BootPlan) -> MachineType:
    """``microvm`` where the guest can be told its TSC frequency, else ``q35``, whose timers it can calibrate by."""
    return "q35" if plan.tsc_khz is None else "microvm"


def kernel_cmdline(plan: BootPlan, accel: QemuAccel) -> str:
    """The caller's text behind what the machine needs; the caller's words come last, so they win.

    Raises CmdlineError when both together are too long.
    """
    words = []
    if plan.tsc_khz is not None and accel == "tcg":
        # TCG's guest TSC is the host's; told so, Linux need not calibrate against timers that TCG serves late.
        words = [f"tsc_early_khz={plan.tsc_khz}", "tsc=reliable"]
    text = " ".join(filter(None, [*words, plan.cmdline]))
    check_cmdline(text)
    return text


def build_command(
    plan: BootPlan,
    qemu: QemuBinary,
    accel: QemuAccel,
    descriptors: ChildDescriptors,
    initrd: str | None,
) -> list[str]:
    """The words that start QEMU with its vCPUs stopped. ``initrd`` is a path as QEMU will see it, None for none."""
    command = [str(qemu.path), *_machine(plan, accel, descriptors.memory), *_isolation(qemu)]
    command += _serial_port("control", descriptors.control, COM2)
    command += _serial_port("console", descriptors.console, COM1)
    command += _socket("qmp", descriptors.qmp)
    command += ["-mon", "chardev=qmp,mode=control", "-S"]
    command += ["-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4"]
    command += device_words(plan, transport_of(plan), qemu.version, descriptors.devices)
    return [*command, *(("-incoming", "defer") if descriptors.restores else _boot(plan, accel, initrd))]


def _boot(plan: BootPlan, accel: QemuAccel, initrd: str | None) -> list[str]:
    command = ["-kernel", str(plan.kernel)]
    if initrd is not None:
        command += ["-initrd", initrd]
    cmdline = kernel_cmdline(plan, accel)
    return [*command, "-append", cmdline] if cmdline else command


def _machine(plan: BootPlan, accel: QemuAccel, memory: MemoryEnd) -> list[str]:
    options = {"microvm": "microvm,acpi=on,isa-serial=off,auto-kernel-cmdline=off", "q35": "q35"}
    backend = f"memory-backend-file,id={RAM},size={plan.memory_mib}M,mem-path=/proc/self/fd/{memory.fd}"
    return [
        *("-name", f"guest={_escape(plan.name)},debug-threads=on"),
        *("-machine", f"{options[choose_machine_type(plan)]},memory-backend={RAM}"),
        *("-object", f"{backend},share={'on' if memory.shared else 'off'}"),
        *("-accel", accel),
        *("-cpu", "host" if accel == "kvm" else "max"),
        *("-m", f"{plan.memory_mib}M"),
        *("-smp", f"{plan.vcpus}"),
    ]


def transport_of(plan: BootPlan) -> Transport:
    """How the plan's devices are attached."""
    return "device" if choose_machine_type(plan) == "microvm" else "pci"


def _isolation(qemu: QemuBinary) -> list[str]:
    words = ["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    return [*words, "-sandbox", SANDBOX] if qemu.sandbox else words


def _serial_port(name: str, fd: int, resources: tuple[int, int]) -> list[str]:
    iobase, irq = resources
    index = 0 if resources == COM1 else 1
    return [*_socket(name, fd), "-device", f"isa-serial,chardev={name},index={index},iobase={iobase:#x},irq={irq}"]


def _socket(name: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={fd}"]


def _escape(value: str) -> str:
    return value.replace(",", ",,")
