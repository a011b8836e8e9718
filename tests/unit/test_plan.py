"""From a configuration to what is booted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncvmm.config import MAX_CMDLINE, VMConfig
from asyncvmm.errors import ConfigError, KernelError
from asyncvmm.guest import cpio
from asyncvmm.guest.cmdline import default_cmdline
from asyncvmm.machine.base import AccelName, BootPlan
from asyncvmm.plan import make_plan

KERNEL, INITRD = Path("/boot/kernel"), Path("/boot/initrd")


def plan(accel: AccelName = "kvm", **options: Any) -> BootPlan:
    return make_plan(VMConfig(**{"kernel": KERNEL, **options}), "name", accel, 2_000_000)


def test_what_was_asked_for_is_what_is_planned() -> None:
    found = plan(initrd=INITRD, memory_mib=512, vcpus=3, cmdline="console=ttyS0")
    assert found == BootPlan(
        name="name",
        memory_mib=512,
        vcpus=3,
        kernel=KERNEL,
        initrd=INITRD,
        cmdline="console=ttyS0",
        tsc_khz=2_000_000,
    )


def test_the_default_command_line_depends_on_the_machine() -> None:
    assert "console=ttyS0" in plan("kvm").cmdline
    assert plan("kvm").cmdline == default_cmdline("kvm") != default_cmdline("qemu")
    assert len(plan("kvm").cmdline) < MAX_CMDLINE


def test_an_empty_command_line_is_taken_as_it_is() -> None:
    assert plan(cmdline="").cmdline == ""


def test_qemu_is_not_started_with_what_our_own_loader_would_refuse(tmp_path: Path) -> None:
    text = tmp_path / "kernel"
    text.write_text("not a kernel\n")
    with pytest.raises(KernelError, match="a text file"):
        plan("qemu", kernel=text)


def test_the_workload_goes_into_an_archive() -> None:
    found = plan(initrd=INITRD, workload=("uname", "-a"), env=("A=b",))
    files = {entry.name: entry.data for entry in cpio.read(found.appended)}
    assert files["asyncvmm/run/argv"] == b"uname\0-a\0"
    assert files["asyncvmm/run/env"] == b"A=b\0"


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": None, "initrd": INITRD},
        {"workload": ("true",)},
        {"initrd": INITRD, "workload": ("x" * 200_000,)},
        {"initrd": INITRD, "workload": ("x",) * 5000},
        {"initrd": INITRD, "workload": ("x",), "env": ("no equals sign",)},
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(**options)


@pytest.mark.parametrize("image", ["nosuch", "", ".", "..", "../../etc", "a/b", "a\0b", "x" * 300])
def test_an_image_that_is_not_there_is_refused(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path))
    with pytest.raises(ConfigError):
        plan(kernel=None, image=image)
