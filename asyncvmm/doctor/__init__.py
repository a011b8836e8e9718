"""The doctor: what this host can do, measured, and one fix for each thing that is wrong.

``diagnose`` looks at host, KVM, QEMU and image, ``render`` prints the result as a page.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from asyncvmm.accel import KvmFacts, QemuFacts, decide, probe_kvm, probe_qemu
from asyncvmm.doctor.host import inspect_host, inspect_software
from asyncvmm.doctor.kvm import inspect_kvm
from asyncvmm.doctor.page import render
from asyncvmm.doctor.remedies import find_problems
from asyncvmm.doctor.report import ChoiceReport, DoctorReport, ImageReport, ImageState, Problem, QemuReport
from asyncvmm.errors import HostError, ImageError
from asyncvmm.guest.store import find_image, home
from asyncvmm.machine.kvm.fds import DEV_KVM
from asyncvmm.machine.qemu.binary import NAME, OVERRIDE

__all__ = ["DoctorReport", "Problem", "diagnose", "render"]


def diagnose(*, kvm_path: Path = DEV_KVM, image_name: str = "default") -> DoctorReport:
    """Examine this host. Blocks for a measurement of KVM and a start of QEMU, well under a second together.

    Raises nothing for what is wrong with the host: that is what the report is for.
    """
    kvm_facts, qemu_facts = probe_kvm(kvm_path), probe_qemu()
    host, kvm = inspect_host(), inspect_kvm(kvm_path, kvm_facts)
    qemu, image = _inspect_qemu(qemu_facts), _inspect_image(image_name)
    return DoctorReport(
        host=host,
        kvm=kvm,
        qemu=qemu,
        image=image,
        software=inspect_software(),
        choice=_choose(kvm_facts, qemu_facts),
        problems=find_problems(host, kvm, qemu, image, lambda command: shutil.which(command) is not None),
    )


def _inspect_qemu(facts: QemuFacts) -> QemuReport:
    override = os.environ.get(OVERRIDE) or None
    path = shutil.which(override or NAME)
    if facts.usable:
        return QemuReport(verdict="usable", path=facts.path, version=facts.version, override=override)
    return QemuReport(
        verdict="absent" if path is None else "unusable",
        path=Path(path) if path else None,
        override=override,
        expected=facts.expected,
        found=facts.found,
    )


def _inspect_image(name: str) -> ImageReport:
    try:
        image = find_image(name)
    except (ImageError, OSError, RuntimeError) as error:
        state: ImageState = "damaged" if os.path.lexists(home() / "images" / name) else "missing"
        return ImageReport(name=name, state=state, found=str(error))
    kernel = str(image.manifest.get("kernel_release"))
    return ImageReport(name=name, state="built", directory=image.directory, kernel=kernel)


def _choose(kvm: KvmFacts, qemu: QemuFacts) -> ChoiceReport:
    try:
        choice = decide("auto", kvm, qemu)
    except HostError as error:
        return ChoiceReport(accel=None, qemu_accel=None, reason=str(error))
    qemu_accel = choice.qemu_accel if choice.accel == "qemu" else None
    return ChoiceReport(accel=choice.accel, qemu_accel=qemu_accel, reason=choice.reason)
