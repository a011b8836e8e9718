"""Compiling floors and guests, once for each content, into the bench's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from _bench.bench import Bench, Skipped

HERE = Path(__file__).parent
GUEST_SCRIPT = HERE / "guests" / "guest.ld"
TESTS_GUESTS = HERE.parents[1] / "tests" / "guests" / "kvm"
"""What the bench's guests share with those of the tests: how ring 3 is entered."""
_GUEST_FLAGS = (
    "-m64",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none,--no-warn-rwx-segments",
    f"-Wl,-T,{GUEST_SCRIPT}",
    f"-I{TESTS_GUESTS}",
)
_FLOOR_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")


def build_floor(bench: Bench, name: str) -> Path:
    """The C floor ``name``. Raises Skipped without a compiler."""
    return _build(bench, HERE / f"{name}.c", _FLOOR_FLAGS)


def build_floor_library(bench: Bench, name: str) -> Path:
    """The C floor ``name`` as a shared object. Raises Skipped without a compiler."""
    return _build(bench, HERE / f"{name}.c", (*_FLOOR_FLAGS, "-shared", "-fPIC"))


def build_static(bench: Bench, source: Path) -> Path:
    """A C program that runs in any guest. Raises Skipped without a compiler."""
    if shutil.which("musl-gcc") is None:
        raise Skipped("no musl-gcc to build it with")
    # The kernel's headers, behind musl's own.
    headers = [f"-idirafter{path}" for path in ("/usr/include", "/usr/include/x86_64-linux-gnu")]
    return _build(bench, source, (*_FLOOR_FLAGS, "-static", *headers), compiler="musl-gcc")


def build_guest(bench: Bench, name: str, **defines: int) -> Path:
    """The guest ``name``, an ELF with a PVH note; ``defines`` are the assembler's macros. Raises Skipped."""
    flags = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    return _build(bench, HERE / "guests" / f"{name}.S", (*_GUEST_FLAGS, *flags))


def _build(bench: Bench, source: Path, flags: Sequence[str], compiler: str = "gcc") -> Path:
    if shutil.which(compiler) is None:
        raise Skipped(f"no {compiler} to build it with")
    bench.cache.mkdir(parents=True, exist_ok=True)
    target = bench.cache / f"{source.stem}-{_key(source, flags)}"
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, "-o", aside, source], check=True, timeout=120)
        aside.rename(target)
    return target


def _key(source: Path, flags: Sequence[str]) -> str:
    beside = sorted(path for path in source.parent.iterdir() if path.suffix in (".h", ".inc", ".ld"))
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (source, *beside, TESTS_GUESTS / "ring3.inc"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
