"""From a configuration to what is booted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from asyncvmm.config import MAX_CMDLINE, VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DeviceConfig, DriveConfig, NetConfig, RngConfig
from asyncvmm.errors import ConfigError, KernelError
from asyncvmm.guest import cpio, store
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


def test_a_qemu_without_acpi_is_refused() -> None:
    with pytest.raises(ConfigError, match="acpi: expected the KVM machine"):
        plan("qemu", acpi=False)
    assert not plan("kvm", acpi=False).acpi


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


# -- devices -----------------------------------------------------------------------------------------------------------


def told(found: BootPlan) -> dict[str, str]:
    """What PID 1 is told, by file."""
    entries = cpio.read(found.appended) if found.appended else ()
    prefix = "asyncvmm/run/"
    return {entry.name.removeprefix(prefix): entry.data.decode() for entry in entries if entry.name.startswith(prefix)}


def test_no_device_asked_for_is_none_planned_and_nothing_told() -> None:
    found = plan(initrd=INITRD)
    assert found.devices == DeviceConfig()
    assert found.appended == b""


def test_devices_are_planned_as_asked_for() -> None:
    found = plan(initrd=INITRD, drives=["a"], balloon=True, rng=True, acpi=False)
    assert found.devices == DeviceConfig(
        drives=(DriveConfig(path="a", id="drive0"),), balloon=BalloonConfig(), rng=RngConfig()
    )
    assert not found.acpi
    assert not {"root", "net", "ports"} & told(found).keys()


def test_devices_of_a_kernel_that_has_no_pid_1_of_ours_are_told_to_nobody() -> None:
    found = plan(drives=[DriveConfig(path="a", root=True)], net="user", virtio_console=True)
    assert found.devices.count == 3
    assert found.appended == b""


@pytest.mark.parametrize("place", range(8))
def test_the_root_is_named_by_its_place_among_the_drives(place: int) -> None:
    drives = [DriveConfig(path=f"image{index}", root=index == place) for index in range(8)]
    assert told(plan(initrd=INITRD, drives=drives))["root"] == f"vd{'abcdefgh'[place]} auto rw\n"


def test_pid_1_is_told_a_roots_type_and_whether_it_can_be_written() -> None:
    root = DriveConfig(path="a", root=True, root_type="erofs", read_only=True)
    assert told(plan(initrd=INITRD, drives=[root]))["root"] == "vda erofs ro\n"


@pytest.mark.parametrize(
    ("net", "line"),
    [
        ("user", "eth0 dhcp\n"),
        (NetConfig(address="10.0.2.20/24"), "eth0 10.0.2.20/24 gateway=10.0.2.2\n"),
        (NetConfig(address="10.9.8.7/24", dns="9.9.9.9"), "eth0 10.9.8.7/24 gateway=10.9.8.1 dns=9.9.9.9\n"),
        (NetConfig(mode="tap", tap="tap0"), "eth0 dhcp\n"),
        (NetConfig(mode="tap", tap="tap0", address="10.0.0.5/24"), "eth0 10.0.0.5/24\n"),
        (
            NetConfig(mode="tap", tap="tap0", address="10.0.0.5/32", gateway="10.0.0.1", dns="10.0.0.2"),
            "eth0 10.0.0.5/32 gateway=10.0.0.1 dns=10.0.0.2\n",
        ),
        (NetConfig(address="none"), None),
        ("none", None),
    ],
)
def test_pid_1_is_told_the_cards_address(net: Any, line: str | None) -> None:
    assert told(plan(initrd=INITRD, rng=True, net=net)).get("net") == line


@pytest.mark.parametrize("address", ["10.0.2.14/30", "10.0.2.15/32"])
def test_a_user_network_without_room_for_a_gateway_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="prefix of at most 29"):
        plan(initrd=INITRD, net=NetConfig(address=address))


def test_pid_1_waits_for_the_ports_by_their_names() -> None:
    assert told(plan(initrd=INITRD, virtio_console=ConsoleConfig(ports=("data", "log"))))["ports"] == "data\nlog\n"
    assert "ports" not in told(plan(initrd=INITRD, virtio_console=True))


# -- images with a root ------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an image whose root has some type into the store; gives the root's path."""

    def build(kind: str) -> Path:
        monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path))
        files = {name: name.encode() for name in (store.KERNEL, store.INITRD, f"root.{kind}")}
        outputs = {name: {"size": len(data)} for name, data in files.items()}
        manifest = orjson.dumps({"format": store.FORMAT, "outputs": outputs})
        with store.locked() as images:
            image = store.publish(images, "default", "key", {**files, store.MANIFEST: manifest})
        assert image.root is not None
        return image.root

    return build


def test_a_root_that_can_be_written_is_written_aside(built: Callable[[str], Path]) -> None:
    path = built("ext4")
    found = plan(kernel=None)
    assert found.devices.drives == (DriveConfig(path=path, id="root", root=True, overlay=True),)
    assert told(found)["root"] == "vda auto rw\n"


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_a_root_that_cannot_be_written_needs_no_overlay(built: Callable[[str], Path], kind: str) -> None:
    path = built(kind)
    found = plan(kernel=None)
    assert found.devices.drives == (DriveConfig(path=path, id="root", root=True, read_only=True),)
    assert told(found)["root"] == "vda auto ro\n"


def test_an_images_root_comes_before_all_drives(built: Callable[[str], Path]) -> None:
    built("ext4")
    found = plan(kernel=None, drives=[f"image{index}" for index in range(8)], workload=("true",))
    assert [drive.id for drive in found.devices.drives] == ["root", *(f"drive{index}" for index in range(8))]
    assert told(found).keys() == {"argv", "env", "root"}


def test_a_root_of_ones_own_takes_the_place_of_the_images(built: Callable[[str], Path]) -> None:
    built("ext4")
    found = plan(kernel=None, drives=["data", DriveConfig(path="own", id="root", root=True)])
    assert [drive.path.name for drive in found.devices.drives] == ["data", "own"]
    assert told(found)["root"] == "vdb auto rw\n"


def test_a_drive_by_the_name_of_the_images_root_is_refused(built: Callable[[str], Path]) -> None:
    built("ext4")
    with pytest.raises(ConfigError, match="drive id: expected another one than the image's root has, found 'root'"):
        plan(kernel=None, drives=[DriveConfig(path="data", id="root")])


def test_a_kernel_of_ones_own_does_not_get_the_images_root(built: Callable[[str], Path]) -> None:
    built("ext4")
    assert plan(initrd=INITRD).devices == DeviceConfig()
