"""What the doctor found, as plain records, and as one JSON object. No I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs

from asyncvmm.accel import QemuAccel, Verdict
from asyncvmm.machine.base import AccelName

VERSION = 1
"""The ``v`` of the JSON object. Fields are only ever added within it."""

VERDICTS: dict[Verdict, str] = {
    "fast": "KVM runs guest kernels at the processor's speed: VMs run on it.",
    "slow": "KVM works but emulates guest kernels instruction by instruction: VMs run on QEMU/TCG.",
    "unusable": "KVM is there but cannot be opened or does not work: VMs run on QEMU/TCG.",
    "absent": "There is no KVM: VMs run on QEMU/TCG.",
}
"""What each verdict on KVM means."""

QemuVerdict = Literal["usable", "unusable", "absent"]
ImageState = Literal["built", "missing", "damaged"]


@attrs.frozen(kw_only=True)
class HostReport:
    """The host. ``virtualization`` is the processor's extension (vmx, svm) that it shows, None for neither; ``nested``
    whether the host is itself a guest; ``kvm_module`` whether its kernel has KVM loaded."""

    kernel: str
    architecture: str
    cpu_model: str | None
    cores: int
    memory_mib: int
    virtualization: Literal["vmx", "svm"] | None
    nested: bool
    kvm_module: bool


@attrs.frozen(kw_only=True)
class DeviceReport:
    """The file that should be KVM's device. ``group`` may use it, where it is not None; ``joined`` says that the user
    is in that group by the group file, and this process is not yet."""

    path: Path
    present: bool
    character_device: bool = False
    readable: bool = False
    writable: bool = False
    group: str | None = None
    joined: bool = False


@attrs.frozen(kw_only=True)
class KvmReport:
    """KVM. ``capabilities`` are those a VM needs, 0 for a missing one; ``expected`` and ``found`` say why it is not
    usable; ``ring0_mips`` is million ring-0 instructions a second, ``exit_us`` microseconds an exit costs."""

    device: DeviceReport
    verdict: Verdict
    expected: str | None = None
    found: str | None = None
    api_version: int | None = None
    capabilities: dict[str, int] = attrs.field(factory=dict)
    max_vcpus: int | None = None
    ring0_mips: float | None = None
    exit_us: float | None = None
    tsc_khz: int | None = None


@attrs.frozen(kw_only=True)
class QemuReport:
    """QEMU. ``override`` is what the environment names as the binary to use, None for nothing."""

    verdict: QemuVerdict
    path: Path | None = None
    version: str | None = None
    override: str | None = None
    expected: str | None = None
    found: str | None = None


@attrs.frozen(kw_only=True)
class ImageReport:
    """The guest image. ``kernel`` is its kernel's release."""

    name: str
    state: ImageState
    directory: Path | None = None
    kernel: str | None = None
    found: str | None = None


@attrs.frozen(kw_only=True)
class SoftwareReport:
    """Versions; None for what is not installed as a package."""

    asyncvmm: str | None
    python: str
    uvloop: str | None


@attrs.frozen(kw_only=True)
class ChoiceReport:
    """What ``accel="auto"`` takes here and why; ``accel`` is None where there is nothing to take."""

    accel: AccelName | None
    qemu_accel: QemuAccel | None
    reason: str


@attrs.frozen
class Problem:
    """What is wrong, what was found, and the one thing to do about it: a shell command or an instruction."""

    what: str
    found: str
    fix: str


@attrs.frozen(kw_only=True)
class DoctorReport:
    """Everything the doctor knows."""

    host: HostReport
    kvm: KvmReport
    qemu: QemuReport
    image: ImageReport
    software: SoftwareReport
    choice: ChoiceReport
    problems: list[Problem]

    @property
    def ready(self) -> bool:
        """Whether a VM can boot here as things are."""
        return self.choice.accel is not None and self.image.state == "built"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for one JSON object."""
        facts = attrs.asdict(self, value_serializer=lambda _, __, value: _plain(value))
        return {"v": VERSION, "ready": self.ready, **facts}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return round(value, 3) if isinstance(value, float) else value
