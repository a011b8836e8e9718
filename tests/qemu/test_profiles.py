"""A real boot on QEMU has every field of the profiles that applies there, and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import DriveConfig
from asyncvmm.errors import BootError
from tests.support.profile_table import boot_whole, check


@pytest.mark.requires("qemu", "image")
@pytest.mark.anyio
async def test_a_boot_on_qemu_has_every_field_that_applies() -> None:
    async with VM(VMConfig(accel="qemu")) as vm:
        await boot_whole(vm)
        check(vm, "qemu")


@pytest.mark.requires("qemu", "image", "passt")
@pytest.mark.anyio
async def test_an_overlay_and_a_network_helper_are_measured(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    drive = DriveConfig(path=tmp_path / "image", overlay=True)
    async with VM(VMConfig(accel="qemu", drives=[drive], net="user")) as vm:
        await boot_whole(vm)
        check(vm, "qemu")
        assert vm.timing is not None
        assert vm.timing.overlay_ms is not None
        assert vm.timing.gvproxy_start_ms


@pytest.mark.requires("qemu", "image")
@pytest.mark.anyio
async def test_a_boot_that_fails_leaves_profiles_of_what_there_was_and_says_where_it_hung() -> None:
    vm = VM(VMConfig(accel="qemu", boot_timeout_s=0.5))
    with pytest.raises(BootError) as caught:
        await vm.boot()
    marks = vm.boot_profile
    assert marks.t_total_start is not None
    assert marks.t_boot_start is not None
    assert marks.t_total_start < marks.t_boot_start
    assert (marks.t_boot_ready, marks.total) == (None, None)
    waited = vm.create_vm_profile.boot_wait
    assert waited is not None
    phases = caught.value.phases
    assert {"setup", "qemu_fork", "boot_wait", "boot", "total"} <= phases.keys()
    assert 0 < phases["boot_wait"] <= waited
    assert phases["boot_wait"] < phases["boot"] < phases["total"]


@pytest.mark.requires("qemu", "image")
@pytest.mark.anyio
async def test_a_boot_that_is_cancelled_leaves_profiles_of_what_there_was() -> None:
    vm = VM(VMConfig(accel="qemu"))
    booting = asyncio.create_task(vm.boot())
    while vm.state != "booting":
        await asyncio.sleep(0.01)
        assert not booting.done()
    booting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booting
    assert vm.boot_profile.t_boot_start is not None
    assert vm.boot_profile.t_boot_ready is None
    assert vm.create_vm_profile.create_vm_total is not None
