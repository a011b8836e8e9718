"""What importing costs, and which imports are forbidden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requirements import ROOT

HEAVY = ("anyio", "asyncio", "attrs", "attr", "click", "ctypes", "orjson", "qemu", "rich", "uvloop")


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_after("import asyncvmm").isdisjoint(HEAVY)


def test_importing_the_vm_loads_neither_uvloop_nor_a_machine() -> None:
    loaded = modules_after("from asyncvmm import VM, VMConfig; VM(VMConfig())")
    assert not {name for name in loaded if name.startswith(("uvloop", "qemu", "rich", "click", "asyncvmm.machine.kvm"))}


def test_every_public_name_is_there_and_lists_itself() -> None:
    import asyncvmm

    for name in asyncvmm.__all__:
        assert getattr(asyncvmm, name) is not None
    assert set(asyncvmm.__all__) <= set(dir(asyncvmm))
    with pytest.raises(AttributeError, match="nosuch"):
        _ = asyncvmm.nosuch
