"""Tests of the KVM machine with real guest kernels, where /dev/kvm is of the hardware kind: inside ``scripts/lab``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VM, ExitStatistics, VMConfig
from asyncvmm.timing.profiles import GuestBootProfile
from tests.support import guest_root, slow_init
from tests.support.requirements import require

SMALL_KERNEL = Path(__file__).parents[2] / ".cache" / "kernel" / "vmlinux"

PATIENCE_S = 150
"""An emulated host is slow, and slower when it is shared."""


def pytest_collection_finish() -> None:
    """Build what is not there, so that a run in the lab finds it."""
    slow_init.build_if_possible()
    guest_root.build_if_possible()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside the lab these tests would find a /dev/kvm that cannot run a kernel, or none."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.requires("lab"))


@attrs.frozen
class Story:
    """What was seen of one guest, from its boot to its end.

    ``console`` is all its output, ``exits`` those until READY, ``code`` the workload's, ``end`` why it stopped.
    """

    accel: str | None
    profile: GuestBootProfile
    exits: ExitStatistics
    console: str
    code: int
    end: str


async def _live(config: VMConfig) -> Story:
    with anyio.fail_after(PATIENCE_S):
        async with VM(config) as vm:
            console = vm.console.subscribe()
            await vm.boot()
            exits = vm.exits
            assert exits is not None
            code = await vm.events.exit
            await vm.shutdown(PATIENCE_S)
            output = console.take().decode(errors="replace").replace("\r\n", "\n")
            return Story(vm.accel, vm.guest_profile, exits, output, code, await vm.events.stopped)


Live = Callable[[VMConfig], Story]


@pytest.fixture(scope="session")
def live() -> Live:
    """Boots a guest on KVM, waits for its workload's end, and has it power off."""
    return lambda config: anyio.run(_live, config, backend_options={"use_uvloop": True})


@pytest.fixture(scope="session")
def small_kernel() -> Path:
    """The vmlinux of ``scripts/build-kernel``."""
    require("small-kernel")
    return SMALL_KERNEL
