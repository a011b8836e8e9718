from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMPILER = "12.2.0"


def _compiler() -> str | None:
    if shutil.which("musl-gcc") is None or shutil.which("objcopy") is None:
        return None
    done = subprocess.run(["musl-gcc", "-dumpfullversion"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


@pytest.mark.skipif(_compiler() != COMPILER, reason=f"needs Debian 12's musl-gcc {COMPILER}, found {_compiler()}")
def test_the_committed_pid_1_is_what_its_source_builds_to(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/build-init", "--to", tmp_path], check=True, capture_output=True)
    assert (tmp_path / "init.bin").read_bytes() == (ROOT / "asyncvmm/guest/init.bin").read_bytes()


def test_pid_1_is_some_tens_of_kilobytes() -> None:
    assert 10_000 < (ROOT / "asyncvmm/guest/init.bin").stat().st_size < 100_000
