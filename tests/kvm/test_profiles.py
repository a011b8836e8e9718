"""A real boot on KVM, of a guest of our own, has every field of the profiles that applies there, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import DriveConfig
from tests.support.profile_table import boot_whole, check

pytestmark = pytest.mark.anyio

SAID = ("ready",)

Config = Callable[..., VMConfig]


@pytest.fixture
def config(guest: Callable[[str], Path], tmp_path: Path) -> Config:
    """A guest that says what it has to say, with some devices."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(range(256)) * 64)

    def make(**devices: Any) -> VMConfig:
        return VMConfig(kernel=guest("foreign"), initrd=initrd, cmdline="BRE", memory_mib=4, accel="kvm", **devices)

    return make


async def test_a_boot_on_kvm_has_every_field_that_applies(config: Config) -> None:
    async with VM(config()) as vm:
        await boot_whole(vm, SAID)
        check(vm, "kvm", SAID)


async def test_an_overlay_is_measured(config: Config, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    async with VM(config(drives=[DriveConfig(path=tmp_path / "image", overlay=True)])) as vm:
        await boot_whole(vm, SAID)
        check(vm, "kvm", SAID)
        assert vm.timing is not None
        assert vm.timing.overlay_ms is not None


@pytest.mark.requires("passt")
async def test_a_network_helper_is_measured(config: Config) -> None:
    async with VM(config(net="user")) as vm:
        await boot_whole(vm, SAID)
        check(vm, "kvm", SAID)
