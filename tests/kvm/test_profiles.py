"""A real boot on KVM, of a guest of our own, has every field of the profiles that applies there, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncvmm import VM, VMConfig
from tests.support.profile_table import boot_whole, check

SAID = ("ready",)


@pytest.mark.anyio
async def test_a_boot_on_kvm_has_every_field_that_applies(guest: Callable[[str], Path], tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(range(256)) * 64)
    config = VMConfig(kernel=guest("foreign"), initrd=initrd, cmdline="BRE", memory_mib=4, accel="kvm")
    async with VM(config) as vm:
        await boot_whole(vm, SAID)
        check(vm, "kvm", SAID)
