"""The suite's rule about skips: a need of the list, and one that this machine does not meet."""

from __future__ import annotations

import pytest

from tests.support import requirements


@pytest.mark.parametrize("reason", ["flaky", "Skipped: no time", "requires luck: none", "requires kvm", ""])
def test_a_skip_for_any_other_reason_is_objected_to(reason: str) -> None:
    assert requirements.objection_to(reason) is not None


def test_a_skip_for_what_the_machine_has_is_objected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requirements.CHECKS, "kvm", lambda: None)
    assert requirements.objection_to("Skipped: requires kvm: it was not there") == "this machine has it"


def test_a_skip_for_what_the_machine_lacks_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requirements.CHECKS, "kvm", lambda: "no such file")
    assert requirements.objection_to("Skipped: requires kvm: no such file") is None


@pytest.mark.parametrize("need", sorted(requirements.CHECKS))
def test_what_a_missing_need_is_skipped_for_is_accepted(monkeypatch: pytest.MonkeyPatch, need: str) -> None:
    monkeypatch.setitem(requirements.CHECKS, need, lambda: "none here")
    assert requirements.objection_to(f"Skipped: requires {need}: none here") is None


@pytest.mark.parametrize("need", sorted(requirements.CHECKS))
def test_every_need_is_met_or_says_why_not(need: str) -> None:
    problem = requirements.problem_with(need)
    assert problem is None or problem
