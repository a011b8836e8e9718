"""What the host is: read from /proc, uname and the installed packages."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from asyncvmm.doctor.report import HostReport, SoftwareReport

CPUINFO = Path("/proc/cpuinfo")
KVM_MODULE = Path("/sys/module/kvm")
_MOST_CPUINFO = 64 << 10


def inspect_host() -> HostReport:
    """The host's kernel, processor and memory. Raises nothing for what it does not say."""
    cpu = parse_cpuinfo(_read(CPUINFO))
    flags = cpu.get("flags", "").split()
    return HostReport(
        kernel=platform.release(),
        architecture=platform.machine(),
        cpu_model=cpu.get("model name"),
        cores=os.cpu_count() or 1,
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        virtualization=_virtualization(flags),
        nested="hypervisor" in flags,
        kvm_module=KVM_MODULE.exists(),
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _virtualization(flags: list[str]) -> Literal["vmx", "svm"] | None:
    if "vmx" in flags:
        return "vmx"
    return "svm" if "svm" in flags else None


def _read(path: Path) -> str:
    try:
        with path.open(errors="replace") as stream:
            return stream.read(_MOST_CPUINFO)
    except OSError:
        return ""


def inspect_software() -> SoftwareReport:
    """Versions of what runs here."""
    return SoftwareReport(
        asyncvmm=_version("asyncvmm"),
        python=".".join(map(str, sys.version_info[:3])),
        uvloop=_version("uvloop"),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
