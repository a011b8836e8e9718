"""scripts/fuzz itself: it runs, and it chooses what is worth keeping. What it attacks is tested in tests/unit/fuzz."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz.inputs import load, saved
from tests.fuzz.keep import fewest, steps

SCRIPT = Path(__file__).parents[3] / "scripts" / "fuzz"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A child counts its parent's memory as its own at its most (getrusage(2)), and the fuzzer has a limit: so a shell
    # comes between.
    command = ["sh", "-c", '"$@"; exit $?', "sh", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.requires("atheris")
def test_a_device_is_attacked_for_a_second() -> None:
    done = fuzz("rng", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "number_of_executed_units" in done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("rng",), ("rng", "0"), ("rng", "soon"), ("toaster", "1"), ("rng", "1", "2")]
)
def test_anything_else_is_answered_by_how_to_use_it(arguments: tuple[str, ...]) -> None:
    done = fuzz(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: scripts/fuzz")


def test_scripts_that_lead_nowhere_new_are_not_kept() -> None:
    run = load("rng")
    scripts = saved("rng")[:10]
    kept = fewest(run, scripts + scripts + [script + b"\0" for script in scripts])
    assert len(kept) <= len(scripts)
    assert set().union(*(steps(run, script) for script in kept)) >= steps(run, scripts[-1])
