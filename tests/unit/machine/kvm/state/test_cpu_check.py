from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotDamaged, SnapshotError, SnapshotMismatch
from asyncvmm.machine.kvm.state.cpu_check import check_cpu, check_tsc, same_tsc

SSE42, AVX512F = 1 << 20, 1 << 16


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "vendor": "GenuineIntel",
        "family": 6,
        "model": 85,
        "stepping": 7,
        "features": {"0x1.0.ecx": SSE42, "0x7.0.ebx": AVX512F},
        "xsave": True,
        "tsc_khz": 2_000_000,
        "tsc_scaling": False,
        **changes,
    }


def test_the_same_cpu_will_do() -> None:
    check_cpu(facts(), facts())


def test_another_model_with_more_features_will_do() -> None:
    check_cpu(facts(), facts(model=143, stepping=1, features={"0x1.0.ecx": 0xFFFFFFFF, "0x7.0.ebx": 0xFFFFFFFF}))


def test_missing_features_are_named() -> None:
    with pytest.raises(SnapshotMismatch) as caught:
        check_cpu(facts(), facts(features={"0x1.0.ecx": 0}))
    assert caught.value.expected == "sse4_2 avx512f"


def test_a_feature_without_a_name_is_named_by_its_place() -> None:
    with pytest.raises(SnapshotMismatch, match=r"cpuid 0x1\.0 ecx bit 16"):
        check_cpu(facts(features={"0x1.0.ecx": 1 << 16}), facts())


def test_many_missing_features_are_counted() -> None:
    with pytest.raises(SnapshotMismatch, match=r"and \d+ more"):
        check_cpu(facts(features={"0x1.0.ecx": 0xFFFFFFFF}), facts(features={}))


def test_another_vendor_will_not_do() -> None:
    with pytest.raises(SnapshotMismatch, match="vendor"):
        check_cpu(facts(), facts(vendor="AuthenticAMD"))


def test_xsave_must_be_there_if_it_was() -> None:
    with pytest.raises(SnapshotMismatch, match="XSAVE"):
        check_cpu(facts(), facts(xsave=False))
    check_cpu(facts(xsave=False), facts())


def test_another_tsc_frequency_will_not_do_unless_it_can_be_scaled_or_is_not_known() -> None:
    with pytest.raises(SnapshotMismatch, match="2000000 kHz"):
        check_cpu(facts(), facts(tsc_khz=2_100_000))
    check_cpu(facts(), facts(tsc_khz=2_100_000, tsc_scaling=True))
    check_cpu(facts(), facts(tsc_khz=None))
    check_cpu(facts(tsc_khz=None), facts())


def test_frequencies_that_were_measured_a_little_differently_are_the_same() -> None:
    assert same_tsc(2_000_000, 2_000_400)
    assert not same_tsc(2_000_000, 2_000_600)
    check_tsc(2_000_000, 1_999_600, scaling=False)


@pytest.mark.parametrize(
    "broken",
    [{"features": None}, {"features": {"0x99.0.eax": 1}}, {"features": {"0x1.0.ecx": -1}}, {"tsc_khz": "many"}],
)
def test_facts_that_are_none_are_damage(broken: dict[str, Any]) -> None:
    with pytest.raises(SnapshotDamaged):
        check_cpu(facts(**broken), facts())


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(facts())), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(facts())), _PLAIN))
def test_whatever_the_facts_they_do_or_are_refused(changes: dict[str, Any]) -> None:
    with suppress(SnapshotError):
        check_cpu(facts(**changes), facts())
