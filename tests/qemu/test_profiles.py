"""A real boot on QEMU has every field of the profiles that applies there, and no other."""

from __future__ import annotations

import pytest

from asyncvmm import VM, VMConfig
from tests.support.profile_table import boot_whole, check


@pytest.mark.requires("qemu", "image")
@pytest.mark.anyio
async def test_a_boot_on_qemu_has_every_field_that_applies() -> None:
    async with VM(VMConfig(accel="qemu")) as vm:
        await boot_whole(vm)
        check(vm, "qemu")
