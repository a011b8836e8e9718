"""Whether a host's processor can run what was saved: as plain facts for a snapshot's manifest, and their comparison.

A vCPU gets its saved CPUID back, so what the saved one may use must be there: the same vendor, every feature that was
offered, every part of the XSAVE state, and a TSC of the same frequency unless KVM can scale it. Another model or
stepping with all of that will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.machine.kvm.state.fields import Fields
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.vcpu import MOST_TSC_KHZ
from asyncvmm.x86.cpu_features import WORDS, Word, feature_names, feature_words, model_of, vendor_of

TSC_TOLERANCE_PPM: Final = 250
"""Two processors of one frequency are measured as different by so much; a guest does not notice it."""

_MOST_NAMED = 20


def cpu_facts(tsc_khz: int | None = None) -> dict[str, Any]:
    """This host's, plain values; ``tsc_khz`` is KVM's idea of the TSC's frequency, None where it is not known yet.

    Raises KvmUnavailable, KvmIoctlError.
    """
    host = host_state()
    family, model, stepping = model_of(host.cpuid)
    return {
        "vendor": vendor_of(host.cpuid),
        "family": family,
        "model": model,
        "stepping": stepping,
        "features": dict(_host_features()),
        "xsave": host.has_xcrs,
        "tsc_khz": tsc_khz,
        "tsc_scaling": host.tsc_scaling,
    }


def check_cpu(saved: Mapping[str, Any], host: Mapping[str, Any]) -> None:
    """Both are ``cpu_facts``. Raises SnapshotMismatch saying what this host lacks, SnapshotDamaged for no facts."""
    there, here = Fields("cpu", dict(saved)), Fields("cpu of this host", dict(host))
    vendor = there.value("vendor")
    if vendor != here.value("vendor"):
        raise SnapshotMismatch("CPU vendor", expected=f"{vendor}"[:40], found=here.value("vendor"))
    _check_features(_features(there), _features(here))
    if there.value("xsave") and not here.value("xsave"):
        raise SnapshotMismatch("CPU", expected="XSAVE", found="a host without it")
    check_tsc(_khz(there), _khz(here), bool(here.value("tsc_scaling")))


def check_tsc(saved_khz: int | None, host_khz: int | None, scaling: bool) -> None:
    """Raises SnapshotMismatch for another frequency of the TSC, which nothing makes up for."""
    if saved_khz is not None and host_khz is not None and not scaling and not same_tsc(saved_khz, host_khz):
        raise SnapshotMismatch("TSC frequency", expected=f"{saved_khz} kHz, or scaling", found=f"{host_khz} kHz")


def same_tsc(one_khz: int, other_khz: int) -> bool:
    """Whether a guest could not tell them apart."""
    return abs(one_khz - other_khz) * 1_000_000 <= TSC_TOLERANCE_PPM * one_khz


@cache
def _host_features() -> Mapping[str, int]:
    return {_key(word): bits for word, bits in feature_words(host_state().cpuid).items()}


def _check_features(saved: Mapping[Word, int], host: Mapping[Word, int]) -> None:
    missing = [name for word, bits in saved.items() for name in feature_names(word, bits & ~host.get(word, 0))]
    if missing:
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        names = " ".join(missing[:_MOST_NAMED]) + more
        raise SnapshotMismatch("CPU features", expected=names, found="a host without them")


def _features(fields: Fields) -> dict[Word, int]:
    inner, value = fields.fields("features"), fields.value("features")
    if not isinstance(value, dict) or not all(key in _BY_KEY for key in value):
        raise SnapshotDamaged("cpu", expected="feature words", found=f"{value}"[:80])
    return {_BY_KEY[key]: inner.integer(key, 0xFFFFFFFF) for key in value}


def _khz(fields: Fields) -> int | None:
    return None if fields.value("tsc_khz") is None else fields.integer("tsc_khz", MOST_TSC_KHZ, 1)


def _key(word: Word) -> str:
    function, index, register = word
    return f"{function:#x}.{index}.{register}"


_BY_KEY = {_key(word): word for word in WORDS}
