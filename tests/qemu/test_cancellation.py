"""A boot on QEMU, cancelled at any moment, leaves no child, thread, descriptor, mapping or temporary file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm import VM, BootError, StateError
from tests.support.cancelling import DELAYS_S, cancel_after, cancel_at_phase
from tests.support.never_ready import held_now, never_ready, warm_up

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "gcc")]

PATIENCE_S = 60
PHASES = ("accel", "setup", "boot", "qemu_cmd_build", "qemu_fork", "qemu_qmp_connect", "boot_wait")


@pytest.fixture
def new_vm(toy_guest: Path, tmp_path: Path) -> Callable[..., VM]:
    return lambda **options: never_ready(toy_guest, tmp_path, **options)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_boot_cancelled_as_a_phase_begins_leaves_nothing(
    new_vm: Callable[[], VM], temporary_directory: Path, phase: str
) -> None:
    await warm_up(new_vm)
    before = held_now()
    vm = new_vm()
    assert await cancel_at_phase(vm, phase), "no such phase"
    assert vm.state == "stopped"
    assert held_now() == before


@pytest.mark.parametrize("delay_s", DELAYS_S)
async def test_a_boot_cancelled_at_some_moment_leaves_nothing(
    new_vm: Callable[[], VM], temporary_directory: Path, delay_s: float
) -> None:
    await warm_up(new_vm)
    before = held_now()
    assert not await cancel_after(new_vm(), delay_s)
    assert held_now() == before


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.02, 0.1])
async def test_stopping_a_vm_ends_its_boot_and_leaves_nothing(
    new_vm: Callable[[], VM], temporary_directory: Path, delay_s: float
) -> None:
    await warm_up(new_vm)
    before = held_now()
    vm = new_vm()

    async def boot() -> None:
        with pytest.raises(StateError):
            await vm.boot()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(boot)
        await anyio.sleep(delay_s)
        await vm.stop()
    assert held_now() == before


async def test_a_boot_that_takes_too_long_says_so_and_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path
) -> None:
    await warm_up(new_vm)
    before = held_now()
    with anyio.fail_after(PATIENCE_S), pytest.raises(BootError) as caught:
        await new_vm(boot_timeout_s=1.0).boot()
    assert caught.value.reason == "timeout"
    assert {"setup", "qemu_fork"} <= caught.value.phases.keys()
    assert (caught.value.rip, caught.value.last_exit, caught.value.exits) == (None, None, None)
    assert b"hello" in caught.value.serial_tail
    assert held_now() == before
