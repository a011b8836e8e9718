"""A boot of the distribution's kernel on KVM has every field of the profiles that applies there, and no other."""

from __future__ import annotations

import anyio
import pytest

import asyncvmm.machine.kvm.machine  # noqa: F401 -- on an emulated host an import takes a second; not on the loop here
from asyncvmm import VM, VMConfig
from tests.support.profile_table import boot_whole, check

PATIENCE_S = 150


@pytest.mark.anyio
async def test_a_boot_on_kvm_has_every_field_that_applies() -> None:
    with anyio.fail_after(PATIENCE_S):
        async with VM(VMConfig(accel="kvm")) as vm:
            await boot_whole(vm)
            check(vm, "kvm")
