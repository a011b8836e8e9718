"""Which machine a VM gets: KVM where it is fast, else QEMU. Measured, not assumed.

``decide`` is the decision alone: facts in, choice or error out. ``choose_accel`` gathers the facts, in worker threads
and no more of them than the decision needs; what KVM measured is kept for the life of the process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Literal

import attrs

from asyncvmm.config import Accel
from asyncvmm.errors import AsyncVMMError, HostError, KvmUnavailable, QemuUnavailable
from asyncvmm.events.types import AccelProbe
from asyncvmm.machine.base import AccelName
from asyncvmm.machine.threads import run_in_thread

Verdict = Literal["fast", "slow", "unusable", "absent"]
QemuAccel = Literal["tcg", "kvm"]

SLOW_MIPS = 20.0
"""Million ring-0 instructions a second below which QEMU/TCG boots a kernel sooner than KVM does."""

_FAST_KVM = f"KVM at {SLOW_MIPS:g} or more million ring-0 instructions a second"


def speed_text(ring0_mips: float) -> str:
    """The speed for people."""
    number = f"{ring0_mips:.0f}" if ring0_mips >= 100 else f"{ring0_mips:.3g}"
    return f"{number} million ring-0 instructions a second"


@attrs.frozen(kw_only=True)
class KvmFacts:
    """What is known about this host's KVM.

    ``usable``: /dev/kvm opens and has what every VM needs; otherwise ``expected`` and ``found`` say why not.
    ``ring0_mips`` (million instructions a second), ``exit_us`` (microseconds) and ``tsc_khz`` are None where they were
    not measured.
    """

    present: bool
    usable: bool
    api_version: int | None = None
    expected: str | None = None
    found: str | None = None
    ring0_mips: float | None = None
    exit_us: float | None = None
    tsc_khz: int | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The facts in one word; None where KVM is usable and was not measured."""
        if not self.present:
            return "absent"
        if not self.usable:
            return "unusable"
        if self.ring0_mips is None:
            return None
        return "fast" if self.ring0_mips >= SLOW_MIPS else "slow"

    @property
    def summary(self) -> str:
        """The facts in half a sentence."""
        if not self.usable:
            return f"KVM is {self.verdict} (expected {self.expected}, found {self.found})"
        if self.ring0_mips is None:
            return "KVM is usable"
        return f"KVM is {self.verdict} ({speed_text(self.ring0_mips)})"


@attrs.frozen(kw_only=True)
class QemuFacts:
    """What is known about this host's QEMU: ``path`` and ``version``, or ``expected`` and ``found`` in their place."""

    path: Path | None = None
    version: str | None = None
    expected: str | None = None
    found: str | None = None

    @property
    def usable(self) -> bool:
        """Whether a QEMU was found that serves."""
        return self.version is not None

    @property
    def summary(self) -> str:
        """The facts in half a sentence."""
        if self.usable:
            return f"QEMU is {self.version}"
        return f"QEMU is not usable (expected {self.expected}, found {self.found})"


@attrs.frozen(kw_only=True)
class AccelChoice:
    """What was chosen and why. ``qemu`` is None where nobody had to look for it."""

    requested: Accel
    accel: AccelName
    reason: str
    kvm: KvmFacts
    qemu: QemuFacts | None = None

    @property
    def qemu_accel(self) -> QemuAccel:
        """What a QEMU child runs on: KVM helps it only where KVM is fast."""
        return "kvm" if self.kvm.verdict == "fast" else "tcg"

    @property
    def tsc_khz(self) -> int | None:
        """The host's TSC frequency, None where it was not measured."""
        return self.kvm.tsc_khz

    def event(self, t_ns: int) -> AccelProbe:
        """This choice as an event."""
        return AccelProbe(
            t_ns,
            accel=self.accel,
            requested=self.requested,
            verdict=self.kvm.verdict,
            reason=self.reason,
            kvm_present=self.kvm.present,
            kvm_usable=self.kvm.usable,
            kvm_api=self.kvm.api_version,
            ring0_mips=_rounded(self.kvm.ring0_mips),
            exit_us=_rounded(self.kvm.exit_us),
            qemu_version=self.qemu.version if self.qemu else None,
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def decide(requested: Accel, kvm: KvmFacts, qemu: QemuFacts | None) -> AccelChoice:
    """The choice. ``qemu`` may be None where ``needs_qemu`` says so.

    Raises KvmUnavailable or QemuUnavailable for what was asked for by name, HostError where ``auto`` finds neither.
    """
    if requested == "kvm":
        return _decide_kvm(kvm, qemu)
    if requested == "auto" and kvm.verdict == "fast":
        return AccelChoice(requested=requested, accel="kvm", reason=kvm.summary, kvm=kvm, qemu=qemu)
    if qemu is None or not qemu.usable:
        raise _no_qemu(requested, kvm, qemu or QemuFacts(expected="it to be looked for", found="nobody did"))
    reason = "asked for" if requested == "qemu" else kvm.summary
    return AccelChoice(requested=requested, accel="qemu", reason=reason, kvm=kvm, qemu=qemu)


def _decide_kvm(kvm: KvmFacts, qemu: QemuFacts | None) -> AccelChoice:
    if not kvm.usable:
        raise KvmUnavailable("KVM", expected=kvm.expected, found=kvm.found)
    return AccelChoice(requested="kvm", accel="kvm", reason="asked for", kvm=kvm, qemu=qemu)


def _no_qemu(requested: Accel, kvm: KvmFacts, qemu: QemuFacts) -> HostError:
    if requested == "qemu":
        return QemuUnavailable("QEMU", expected=qemu.expected, found=qemu.found)
    return HostError("accelerator", expected=f"{_FAST_KVM}, or QEMU", found=f"{kvm.summary}; {qemu.summary}")


def needs_qemu(requested: Accel, kvm: KvmFacts) -> bool:
    """Whether ``decide`` has to know about QEMU."""
    return requested == "qemu" or (requested == "auto" and kvm.verdict != "fast")


async def choose_accel(requested: Accel = "auto", *, measure_again: bool = False) -> AccelChoice:
    """Find out what this host has, and choose. KVM asked for by name is opened, not measured.

    The first measurement in a process takes some 10 ms, a worker thread's. ``measure_again`` forgets it. Raises as
    ``decide`` does. Cancelled, it ends when the worker thread does: within the time limit of a measurement.
    """
    if measure_again:
        forget_measurements()
    measured = requested != "kvm"
    kvm = await run_in_thread(lambda: probe_kvm(measured=measured))
    qemu = await run_in_thread(probe_qemu) if needs_qemu(requested, kvm) else None
    return decide(requested, kvm, qemu)


_measured: dict[Path, KvmFacts] = {}
_measuring = threading.Lock()


def forget_measurements() -> None:
    """Measure again when next asked."""
    _measured.clear()


def probe_kvm(path: Path | None = None, *, measured: bool = True) -> KvmFacts:
    """What the KVM device ``path`` (/dev/kvm) is worth. Blocks; raises nothing for a host that lacks it."""
    from asyncvmm.machine.kvm.abi import KVM_API_VERSION
    from asyncvmm.machine.kvm.fds import DEV_KVM
    from asyncvmm.machine.kvm.system import KvmSystem

    path = path or DEV_KVM
    try:
        KvmSystem.open(path).close()
        return _measure_once(path) if measured else KvmFacts(present=True, usable=True, api_version=KVM_API_VERSION)
    except AsyncVMMError as error:
        present = os.path.exists(path)
        return KvmFacts(present=present, usable=False, expected=_fact(error.expected), found=_fact(error.found, error))


def _fact(value: object, otherwise: object = "it to work") -> str:
    return str(otherwise if value is None else value)


def _measure_once(path: Path) -> KvmFacts:
    from asyncvmm.machine.kvm.abi import KVM_API_VERSION
    from asyncvmm.machine.kvm.calibrate import measure

    with _measuring:
        if path not in _measured:
            result = measure(path)
            _measured[path] = KvmFacts(
                present=True,
                usable=True,
                api_version=KVM_API_VERSION,
                ring0_mips=result.ring0_mips,
                exit_us=result.exit_us,
                tsc_khz=result.tsc_khz,
            )
        return _measured[path]


def probe_qemu() -> QemuFacts:
    """What QEMU this host has. Blocks for a process start, the first time; raises nothing for a host that has none."""
    from asyncvmm.machine.qemu.binary import find_qemu

    try:
        binary = find_qemu()
    except QemuUnavailable as error:
        return QemuFacts(expected=_fact(error.expected), found=_fact(error.found, error))
    return QemuFacts(path=binary.path, version=".".join(map(str, binary.version)))
