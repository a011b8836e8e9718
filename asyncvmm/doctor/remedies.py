"""What is wrong, and one fix for each thing that is: facts in, problems out. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from asyncvmm.accel import SLOW_MIPS, speed_text
from asyncvmm.doctor.report import DeviceReport, HostReport, ImageReport, KvmReport, Problem, QemuReport

_INSTALL_QEMU = {
    "apt-get": "apt-get install qemu-system-x86",
    "dnf": "dnf install qemu-system-x86-core",
    "pacman": "pacman -S qemu-system-x86",
    "apk": "apk add qemu-system-x86_64",
    "zypper": "zypper install qemu-x86",
}
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}


def find_problems(
    host: HostReport, kvm: KvmReport, qemu: QemuReport, image: ImageReport, has_command: Callable[[str], bool]
) -> list[Problem]:
    """Every problem, the one that costs most first. ``has_command`` says whether a program is on this host's PATH."""
    found = (_kvm_problem(host, kvm), _qemu_problem(kvm, qemu, has_command), _image_problem(image))
    return [problem for problem in found if problem is not None]


def _kvm_problem(host: HostReport, kvm: KvmReport) -> Problem | None:
    if kvm.verdict == "fast":
        return None
    if kvm.verdict == "slow":
        return Problem(
            "KVM is slow",
            f"{speed_text(kvm.ring0_mips or 0)} ({SLOW_MIPS:g} needed)",
            "run on bare metal, or where the host gives this machine hardware nested virtualization",
        )
    found = f"{kvm.found} (expected {kvm.expected})"
    if kvm.verdict == "absent":
        return Problem("KVM is absent", found, _fix_for_absence(host, kvm.device))
    return Problem("KVM is unusable", found, _fix_for_uselessness(host, kvm))


def _fix_for_absence(host: HostReport, device: DeviceReport) -> str:
    if host.architecture != "x86_64":
        return f"use an x86-64 host (this one is {host.architecture})"
    if host.kvm_module:
        return f"let this container have the device: --device {device.path}"
    if host.virtualization is not None:
        return f"modprobe {_MODULES[host.virtualization]}"
    if host.nested:
        return "enable nested virtualization for this machine on its host"
    return "enable VT-x or AMD-V in the firmware's setup"


def _fix_for_uselessness(host: HostReport, kvm: KvmReport) -> str:
    device = kvm.device
    if not (device.readable and device.writable):
        return _fix_for_denial(device)
    if not device.character_device:
        return f"rm -r {device.path} && mknod {device.path} c 10 232"
    if "permission denied" in (kvm.found or ""):
        return f"let this container use the device: --device {device.path}"
    if kvm.api_version is None:
        return f"rm {device.path} && mknod {device.path} c 10 232"
    if not all(kvm.capabilities.values()) or not kvm.capabilities:
        return "boot a newer kernel"
    module = _MODULES.get(host.virtualization or "", "kvm")
    return f"stop other hypervisors and reload KVM: modprobe -r {module} && modprobe {module}"


def _fix_for_denial(device: DeviceReport) -> str:
    if device.joined:
        return f"log out and in again: membership of group {device.group} begins with a login"
    if device.group is not None:
        return f"usermod -aG {device.group} $USER"
    return f"chgrp kvm {device.path} && chmod 660 {device.path}"


def _qemu_problem(kvm: KvmReport, qemu: QemuReport, has_command: Callable[[str], bool]) -> Problem | None:
    # Where KVM is fast nobody needs QEMU.
    if qemu.verdict == "usable" or kvm.verdict == "fast":
        return None
    found = f"{qemu.found} (expected {qemu.expected})"
    return Problem(f"QEMU is {qemu.verdict}", found, _fix_for_qemu(qemu, has_command))


def _fix_for_qemu(qemu: QemuReport, has_command: Callable[[str], bool]) -> str:
    if qemu.override is not None:
        return "unset ASYNCVMM_QEMU"
    if qemu.verdict == "unusable":
        return "install QEMU 6.0 or newer and name it in $ASYNCVMM_QEMU"
    managers = (command for manager, command in _INSTALL_QEMU.items() if has_command(manager))
    return next(managers, "install QEMU for x86-64 (qemu-system-x86_64)")


def _image_problem(image: ImageReport) -> Problem | None:
    if image.state == "built":
        return None
    what = f"guest image {image.name!r} is {image.state}"
    return Problem(what, image.found or image.state, "asyncvmm image build")
