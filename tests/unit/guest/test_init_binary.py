from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.requires("musl-gcc")
def test_the_committed_pid_1_is_what_its_source_builds_to(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/build-init", "--to", tmp_path], check=True, capture_output=True)
    assert (tmp_path / "init.bin").read_bytes() == (ROOT / "asyncvmm/guest/init.bin").read_bytes()


def test_pid_1_is_some_tens_of_kilobytes() -> None:
    assert 10_000 < (ROOT / "asyncvmm/guest/init.bin").stat().st_size < 100_000
