"""A VM on QEMU whose guest greets and never is ready, for boots that are cut short; and what must not be left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncvmm import VM, VMConfig
from tests.support.cancelling import cancel_at_phase
from tests.support.holdings import Holdings

MEMORY_MIB = 32


def never_ready(toy_guest: Path, directory: Path, **options: Any) -> VM:
    """The VM, with ``options`` of VMConfig; its files and events are in ``directory``."""
    initrd = directory / "initrd"
    initrd.write_bytes(bytes(4096))
    config = VMConfig(
        kernel=toy_guest, initrd=initrd, workload=("true",), memory_mib=MEMORY_MIB, accel="qemu", **options
    )
    vm = VM(config)
    vm.stream_to(directory / "events.jsonl")
    return vm


def held_now() -> Holdings:
    """What this process holds."""
    return Holdings.now(MEMORY_MIB << 20)


async def warm_up(new_vm: Callable[[], VM]) -> None:
    """What a process keeps for good (modules, caches, worker threads) is made by its first VM."""
    assert await cancel_at_phase(new_vm(), "boot_wait")
