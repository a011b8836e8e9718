"""JSON lines of real boots, for all consumers: one of the command, several VMs in one file with a boot that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import attrs
import orjson
import pytest

from asyncvmm import VM, BootError, VMConfig
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.profiles import CreateVmProfile
from tests.kvm.conftest import build, guest_path
from tests.support.requirements import require

PATIENCE_S = 120

NAMES = ("123e4567", "0017", "true")
"""Names of VMs that a reader might take for numbers, or worse. The last one's boot fails."""


@pytest.fixture(scope="session")
def boot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``asyncvmm boot --jsonl`` writes of one boot on QEMU."""
    require("qemu")
    require("image")
    path = tmp_path_factory.mktemp("consumers") / "boot.jsonl"
    asyncvmm = Path(sys.executable).with_name("asyncvmm")
    command = [str(asyncvmm), "boot", "--accel", "qemu", "--jsonl", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    return path


@attrs.frozen
class Boots:
    """Boots in this process, and the file of all their lines. The profiles are those of the VMs, by name."""

    path: Path
    boot: dict[str, BootProfile] = attrs.field(factory=dict)
    create_vm: dict[str, CreateVmProfile] = attrs.field(factory=dict)


async def _boot(boots: Boots, name: str, lines: list[bytes], timeout_s: float = 300.0) -> None:
    async with VM(VMConfig(accel="qemu", name=name, boot_timeout_s=timeout_s)) as vm:
        vm.stream_to(lines.append)
        await vm.boot()
        boots.boot[name], boots.create_vm[name] = vm.boot_profile, vm.create_vm_profile


async def _boot_all(boots: Boots) -> None:
    lines: list[bytes] = []
    with anyio.fail_after(PATIENCE_S):
        for name in NAMES[:-1]:
            await _boot(boots, name, lines)
        with pytest.raises(BootError):
            await _boot(boots, NAMES[-1], lines, 0.3)
    whole = b"".join(lines).splitlines(keepends=True)
    whole.sort(key=lambda line: int(orjson.loads(line)["t_ns"]))
    boots.path.write_bytes(b"".join(whole))


@pytest.fixture(scope="session")
def boots(tmp_path_factory: pytest.TempPathFactory) -> Boots:
    """Two boots that went well and one that did not, their lines mixed."""
    require("qemu")
    require("image")
    boots = Boots(tmp_path_factory.mktemp("consumers") / "boots.jsonl")
    anyio.run(_boot_all, boots)
    return boots


@pytest.fixture(scope="session")
def kvm_boot(tmp_path_factory: pytest.TempPathFactory) -> Boots:
    """A boot on KVM of a guest of our own, whose every step is ours."""
    require("kvm")
    guest = guest_path("foreign")
    if not guest.exists():
        require("gcc")
        build("foreign", guest)
    boots = Boots(tmp_path_factory.mktemp("consumers") / "kvm.jsonl")
    initrd = boots.path.with_name("initrd")
    initrd.write_bytes(bytes(1 << 20))

    async def boot() -> None:
        async with VM(VMConfig(kernel=guest, initrd=initrd, cmdline="BRE", memory_mib=8, accel="kvm")) as vm:
            vm.stream_to(boots.path)
            await vm.boot()
            boots.boot[vm.name], boots.create_vm[vm.name] = vm.boot_profile, vm.create_vm_profile

    anyio.run(boot)
    return boots
