"""Fixtures of the tests that run QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.command import QemuBinary
from tests.support.qemu_machine import SOME_TSC_KHZ, TOY_MIB, running
from tests.support.qemu_saved import Taken, take
from tests.support.requirements import require


@pytest.fixture(scope="session")
def qemu() -> QemuBinary:
    """The QEMU on this machine."""
    require("qemu")
    return find_qemu()


@pytest.fixture
def plan(toy_guest: Path) -> BootPlan:
    """The toy guest, without a device."""
    return BootPlan(name="toy", memory_mib=TOY_MIB, vcpus=1, kernel=toy_guest, initrd=None, tsc_khz=SOME_TSC_KHZ)


@pytest.fixture
async def taken(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> Taken:
    """The toy, saved when it had said hello."""
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        await machine.pause()
        return await take(machine, tmp_path / "memory")
