"""The project's own PID 1 with a nap of 300 ms between uart_access_done and init_ok (guests/slow_modules.c).

Kept in .cache/guests under a name that says what went into it: where there is no compiler, as in the lab, one that was
built before serves.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from asyncvmm.guest import cpio
from asyncvmm.guest.store import Image
from tests.support.requirements import ROOT, problem_with, require

NAP_NS = 300_000_000

_SOURCES = ROOT / "asyncvmm" / "guest" / "init"
_SLOW = ROOT / "tests" / "guests" / "slow_modules.c"
_CACHE = ROOT / ".cache" / "guests"


def slow_initrd(image: Image, directory: Path) -> Path:
    """The image's initrd with the slow PID 1 in it. Skips the test where that cannot be built."""
    if not (program := _path()).exists():
        require("musl-gcc")
        _build(program)
    target = directory / "slow-initrd"
    target.write_bytes(image.initrd.read_bytes() + cpio.write([cpio.file("init", program.read_bytes(), 0o755)]))
    return target


def build_if_possible() -> None:
    """So that a run elsewhere finds it."""
    if not (program := _path()).exists() and problem_with("musl-gcc") is None:
        _build(program)


def _inputs() -> list[Path]:
    return [*sorted(path for path in _SOURCES.glob("*.c") if path.name != "modules.c"), _SLOW]


def _path() -> Path:
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in [*_inputs(), _SOURCES / "init.h"]))
    return _CACHE / f"slow-init-{digest.hexdigest()[:16]}"


def _build(target: Path) -> None:
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        built = Path(scratch, "init")
        flags = ["-std=gnu11", "-Os", "-static", "-s", f"-I{_SOURCES}"]
        subprocess.run(["musl-gcc", *flags, "-o", str(built), *map(str, _inputs())], check=True, timeout=60)
        built.rename(target)
