"""What keeps a QEMU machine from starting: plans that cannot be, a QEMU that ends, talks nonsense or is silent."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.errors import CmdlineError, InitrdError, KernelError, MachineError, StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import PATIENCE_S, Witness, holdings, running

pytestmark = pytest.mark.anyio


async def test_a_machine_starts_once(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, _):
        with pytest.raises(StateError, match="new machine"):
            await machine.start()
    with pytest.raises(StateError):
        await machine.start()


@attrs.frozen
class BadPlan:
    change: dict[str, Any]
    error: type[Exception]
    found: str


BAD_PLANS = {
    "no kernel": BadPlan({"kernel": Path("/nonexistent")}, KernelError, "No such file"),
    "a directory": BadPlan({"kernel": Path("/")}, KernelError, "directory"),
    "no initrd": BadPlan({"initrd": Path("/nonexistent")}, InitrdError, "No such file"),
    "long cmdline": BadPlan({"cmdline": "x" * 2047}, CmdlineError, "bytes"),
    "text kernel": BadPlan({"kernel": Path(__file__)}, MachineError, "QEMU: exit status 1"),
}


@pytest.mark.parametrize("bad", BAD_PLANS.values(), ids=BAD_PLANS.keys())
async def test_a_plan_that_cannot_be_is_refused_with_what_was_found(
    plan: BootPlan, qemu: QemuBinary, bad: BadPlan
) -> None:
    before, witness = holdings(), Witness()
    machine = QemuMachine(attrs.evolve(plan, **bad.change), Timeline(), witness.take, qemu=qemu)
    with pytest.raises(bad.error, match=re.escape(bad.found)) as caught:
        await machine.start()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go
    assert not witness.effects
    if isinstance(caught.value, MachineError):
        assert not caught.value.retryable


@pytest.mark.parametrize(
    ("script", "words", "retryable"),
    [
        ("echo first >&2; echo no such option >&2; exit 1", "exit status 1: no such option", False),
        ("echo cannot set up guest memory: Cannot allocate memory >&2; exit 1", "Cannot allocate memory", True),
        ("kill -9 $$", "SIGKILL", True),
        ("exit 0", "exit status 0", False),
        ("head -c 1000000 /dev/zero >&2; echo; echo the end >&2; exit 1", "the end", False),
    ],
)
async def test_a_qemu_that_ends_at_its_start_is_quoted(
    plan: BootPlan, tmp_path: Path, script: str, words: str, retryable: bool
) -> None:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.fail_after(PATIENCE_S), pytest.raises(MachineError, match=re.escape(words)) as caught:
        await machine.start()
    assert caught.value.retryable is retryable
    assert len(str(caught.value)) < 5000
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_qemu_that_talks_nonsense_is_killed(plan: BootPlan, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys, time\n"
        "fd = int(next(w for w in sys.argv if w.startswith('socket,id=qmp')).partition('fd=')[2])\n"
        "os.write(fd, b'nonsense\\n')\ntime.sleep(1000)\n"
    )
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.fail_after(PATIENCE_S), pytest.raises(MachineError, match="nonsense"):
        await machine.start()
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go


async def test_a_qemu_that_is_silent_can_be_cancelled(plan: BootPlan, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\nexec sleep 1000\n")
    path.chmod(0o755)
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=QemuBinary(path, (7, 2)))
    with anyio.move_on_after(0.1) as scope:
        await machine.start()
    assert scope.cancelled_caught
    assert not holdings() - before  # less is no leak: what an earlier test left to the collector may go
