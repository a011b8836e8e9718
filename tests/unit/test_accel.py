"""The accelerator's choice: the decision for every state of a host, and facts gathered from files that are no KVM."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.accel import (
    SLOW_MIPS,
    AccelChoice,
    KvmFacts,
    QemuFacts,
    choose_accel,
    decide,
    needs_qemu,
    probe_kvm,
    probe_qemu,
)
from asyncvmm.config import Accel
from asyncvmm.errors import HostError, KvmUnavailable, QemuUnavailable
from asyncvmm.events.encoding import to_line

FAST = KvmFacts(present=True, usable=True, api_version=12, ring0_mips=2400.0, exit_us=3.5, tsc_khz=2_300_000)
SLOW = KvmFacts(present=True, usable=True, api_version=12, ring0_mips=1.9, exit_us=9.6, tsc_khz=2_300_000)
OPENED = KvmFacts(present=True, usable=True, api_version=12)
DENIED = KvmFacts(present=True, usable=False, expected="access to /dev/kvm", found="permission denied")
ABSENT = KvmFacts(present=False, usable=False, expected="/dev/kvm", found="no such file")
QEMU = QemuFacts(path=Path("/usr/bin/qemu-system-x86_64"), version="7.2.22")
NO_QEMU = QemuFacts(expected="qemu-system-x86_64 on PATH", found="no qemu-system-x86_64")


@pytest.mark.parametrize(
    ("kvm", "verdict"), [(FAST, "fast"), (SLOW, "slow"), (DENIED, "unusable"), (ABSENT, "absent"), (OPENED, None)]
)
def test_a_verdict_follows_from_the_facts(kvm: KvmFacts, verdict: str | None) -> None:
    assert kvm.verdict == verdict


def test_kvm_at_the_threshold_itself_is_fast() -> None:
    assert KvmFacts(present=True, usable=True, ring0_mips=SLOW_MIPS).verdict == "fast"
    assert KvmFacts(present=True, usable=True, ring0_mips=SLOW_MIPS - 0.001).verdict == "slow"


@pytest.mark.parametrize(
    ("requested", "kvm", "qemu", "accel", "qemu_accel"),
    [
        ("auto", FAST, QEMU, "kvm", "kvm"),
        ("auto", FAST, NO_QEMU, "kvm", "kvm"),
        ("auto", FAST, None, "kvm", "kvm"),
        ("auto", SLOW, QEMU, "qemu", "tcg"),
        ("auto", DENIED, QEMU, "qemu", "tcg"),
        ("auto", ABSENT, QEMU, "qemu", "tcg"),
        ("auto", OPENED, QEMU, "qemu", "tcg"),
        ("kvm", FAST, None, "kvm", "kvm"),
        ("kvm", SLOW, None, "kvm", "tcg"),
        ("kvm", OPENED, None, "kvm", "tcg"),
        ("qemu", FAST, QEMU, "qemu", "kvm"),
        ("qemu", SLOW, QEMU, "qemu", "tcg"),
        ("qemu", DENIED, QEMU, "qemu", "tcg"),
        ("qemu", ABSENT, QEMU, "qemu", "tcg"),
    ],
)
def test_the_machine_chosen(
    requested: Accel, kvm: KvmFacts, qemu: QemuFacts | None, accel: str, qemu_accel: str
) -> None:
    choice = decide(requested, kvm, qemu)
    assert (choice.accel, choice.qemu_accel, choice.requested) == (accel, qemu_accel, requested)
    assert choice.tsc_khz == kvm.tsc_khz


@pytest.mark.parametrize("kvm", [DENIED, ABSENT])
def test_kvm_asked_for_by_name_and_not_usable_is_an_error_with_its_facts(kvm: KvmFacts) -> None:
    with pytest.raises(KvmUnavailable) as caught:
        decide("kvm", kvm, QEMU)
    assert (caught.value.expected, caught.value.found) == (kvm.expected, kvm.found)


def test_qemu_asked_for_by_name_and_not_there_is_an_error_even_where_kvm_is_fast() -> None:
    with pytest.raises(QemuUnavailable) as caught:
        decide("qemu", FAST, NO_QEMU)
    assert (caught.value.expected, caught.value.found) == (NO_QEMU.expected, NO_QEMU.found)


def test_slow_kvm_without_qemu_is_an_error_that_tells_both() -> None:
    with pytest.raises(HostError) as caught:
        decide("auto", SLOW, NO_QEMU)
    text = str(caught.value)
    assert "KVM is slow (1.9 million ring-0 instructions a second)" in text
    assert "no qemu-system-x86_64" in text


@pytest.mark.parametrize("kvm", [DENIED, ABSENT])
def test_neither_kvm_nor_qemu_is_an_error_that_tells_both(kvm: KvmFacts) -> None:
    with pytest.raises(HostError, match=str(kvm.found)) as caught:
        decide("auto", kvm, NO_QEMU)
    assert str(NO_QEMU.found) in str(caught.value)


measurements = st.none() | st.floats(0, 1e6)
kvm_facts = st.builds(
    KvmFacts,
    present=st.booleans(),
    usable=st.booleans(),
    ring0_mips=measurements,
    exit_us=measurements,
    tsc_khz=st.none() | st.integers(1, 10**7),
).filter(lambda facts: facts.present or not facts.usable)


@given(st.sampled_from(["auto", "kvm", "qemu"]), kvm_facts, st.sampled_from([QEMU, NO_QEMU, None]))
def test_whatever_the_host_the_choice_is_a_usable_machine_or_a_typed_error(
    requested: Accel, kvm: KvmFacts, qemu: QemuFacts | None
) -> None:
    try:
        choice = decide(requested, kvm, qemu)
    except HostError:
        return
    assert requested in ("auto", choice.accel)
    assert kvm.usable if choice.accel == "kvm" else qemu is not None and qemu.usable
    assert choice.qemu_accel == "tcg" or kvm.verdict == "fast"


@given(st.sampled_from(["auto", "kvm", "qemu"]), kvm_facts)
def test_qemu_is_not_looked_for_where_the_decision_is_the_same_without_it(requested: Accel, kvm: KvmFacts) -> None:
    if not needs_qemu(requested, kvm) and (requested != "kvm" or kvm.usable):
        assert decide(requested, kvm, None).accel == decide(requested, kvm, QEMU).accel == "kvm"


def test_the_event_tells_what_was_measured_and_what_was_taken() -> None:
    line = orjson.loads(to_line(decide("auto", SLOW, QEMU).event(7), "a1b2", 0))
    expected = {
        "event": "accel.probe",
        "t_ns": 7,
        "requested": "auto",
        "accel": "qemu",
        "verdict": "slow",
        "ring0_mips": 1.9,
        "exit_us": 9.6,
        "kvm_present": True,
        "kvm_usable": True,
        "kvm_api": 12,
        "qemu_version": "7.2.22",
    }
    assert expected.items() <= line.items()


def test_a_path_where_nothing_is_makes_kvm_absent(tmp_path: Path) -> None:
    facts = probe_kvm(tmp_path / "kvm")
    assert facts.verdict == "absent"
    assert facts.expected == str(tmp_path / "kvm")


@pytest.mark.parametrize("kind", ["a regular file", "a directory", "another device"])
def test_something_else_where_kvm_should_be_makes_it_unusable(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/null") if kind == "another device" else tmp_path / "kvm"
    if kind == "a regular file":
        path.write_bytes(b"not KVM")
    elif kind == "a directory":
        path.mkdir()
    facts = probe_kvm(path)
    assert facts.verdict == "unusable"
    assert facts.expected
    assert facts.found


@pytest.mark.requires("unprivileged")
def test_no_permission_for_kvm_makes_it_unusable(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.touch(mode=0)
    assert "permission denied" in str(probe_kvm(path).found)


def test_a_qemu_that_is_not_there_is_told_of_and_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASYNCVMM_QEMU", str(tmp_path / "qemu"))
    facts = probe_qemu()
    assert not facts.usable
    assert str(tmp_path / "qemu") in str(facts.found)


@pytest.mark.anyio
async def test_on_a_host_without_kvm_and_qemu_no_machine_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("asyncvmm.machine.kvm.fds.DEV_KVM", tmp_path / "kvm")
    monkeypatch.setenv("ASYNCVMM_QEMU", str(tmp_path / "qemu"))
    with pytest.raises(HostError, match="KVM is absent"):
        await choose_accel("auto")
    with pytest.raises(KvmUnavailable):
        await choose_accel("kvm")
    with pytest.raises(QemuUnavailable):
        await choose_accel("qemu")


@pytest.mark.anyio
@pytest.mark.requires("qemu")
async def test_a_host_with_qemu_alone_gets_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("asyncvmm.machine.kvm.fds.DEV_KVM", tmp_path / "kvm")
    choice: AccelChoice = await choose_accel("auto")
    assert (choice.accel, choice.qemu_accel, choice.tsc_khz) == ("qemu", "tcg", None)
