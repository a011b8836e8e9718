"""Fixtures for every layer of the suite: the event loops, the toy guest, and what must not be left behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

GUESTS = Path(__file__).parent / "guests"
LOOPS = {"asyncio": {"use_uvloop": False}, "uvloop": {"use_uvloop": True}}


@pytest.fixture(params=list(LOOPS.items()), ids=list(LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Each test marked ``anyio`` runs on both event loops."""
    return "asyncio", request.param[1]


@pytest.fixture(scope="session")
def toy_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy guest (guests/toy.S), an ELF with a PVH note."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to assemble the toy guest with")
    target = tmp_path_factory.mktemp("guests") / "toy.elf"
    flags = ["-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", f"-Wl,-T,{GUESTS / 'toy.ld'}"]
    subprocess.run([compiler, *flags, "-o", target, GUESTS / "toy.S"], check=True, timeout=60)
    return target
