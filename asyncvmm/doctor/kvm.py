"""What KVM is worth here: its device file, its version and capabilities, and what was measured."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

import attrs

from asyncvmm.accel import KvmFacts
from asyncvmm.doctor.report import DeviceReport, KvmReport
from asyncvmm.errors import KvmIoctlError
from asyncvmm.machine.kvm.abi import KVM_API_VERSION, Capability, Request
from asyncvmm.machine.kvm.fds import check_extension, ioctl
from asyncvmm.machine.kvm.system import NEEDED

_GROUP_MAY = stat.S_IRGRP | stat.S_IWGRP


def inspect_kvm(path: Path, facts: KvmFacts) -> KvmReport:
    """The device at ``path`` and, where it opens, what it says, beside what was measured. Raises nothing."""
    report = KvmReport(
        device=_inspect_device(path),
        verdict=facts.verdict or "unusable",
        expected=facts.expected,
        found=facts.found,
        ring0_mips=facts.ring0_mips,
        exit_us=facts.exit_us,
        tsc_khz=facts.tsc_khz,
    )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return report
    try:
        return _ask(fd, report)
    except KvmIoctlError:
        return report
    finally:
        os.close(fd)


def _ask(fd: int, report: KvmReport) -> KvmReport:
    version = ioctl(fd, Request.KVM_GET_API_VERSION)
    if version != KVM_API_VERSION:
        return attrs.evolve(report, api_version=version)
    return attrs.evolve(
        report,
        api_version=version,
        capabilities={needed.name: check_extension(fd, needed) for needed in NEEDED},
        max_vcpus=check_extension(fd, Capability.KVM_CAP_MAX_VCPUS),
    )


def _inspect_device(path: Path) -> DeviceReport:
    try:
        status = path.stat()
    except OSError:
        return DeviceReport(path=path, present=False)
    group = _group_name(status.st_gid) if status.st_mode & _GROUP_MAY == _GROUP_MAY and status.st_gid else None
    return DeviceReport(
        path=path,
        present=True,
        character_device=stat.S_ISCHR(status.st_mode),
        readable=os.access(path, os.R_OK),
        writable=os.access(path, os.W_OK),
        group=group,
        joined=group is not None and status.st_gid not in os.getgroups() and _is_listed(group),
    )


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None


def _is_listed(group: str) -> bool:
    try:
        return pwd.getpwuid(os.getuid()).pw_name in grp.getgrnam(group).gr_mem
    except KeyError:
        return False
