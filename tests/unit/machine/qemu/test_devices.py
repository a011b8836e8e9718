"""QEMU's words for the virtio devices follow from the plan and the descriptors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.device_config import (
    BalloonConfig,
    ConsoleConfig,
    DeviceConfig,
    DriveConfig,
    NetConfig,
    RngConfig,
    VsockConfig,
)
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.devices import DeviceEnds, DriveEnd, Transport, device_words, entropy_budget

QEMU = QemuBinary(Path("/usr/bin/qemu-system-x86_64"), (7, 2, 22))
PLAN = BootPlan(name="vm", memory_mib=256, vcpus=1, kernel=Path("/k"), initrd=None, tsc_khz=2_300_000)


def plan_of(resources: Resources | None = None, **devices: Any) -> BootPlan:
    return attrs.evolve(PLAN, devices=DeviceConfig(**devices), resources=resources or Resources())


def words_of(
    plan: BootPlan, ends: DeviceEnds | None = None, transport: Transport = "device", version: tuple[int, ...] = (7, 2)
) -> list[str]:
    return device_words(plan, transport, version, ends or DeviceEnds())


def values(words: list[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def drive_words(*drives: DriveConfig, transport: Transport = "device", **changes: Any) -> list[str]:
    named = tuple(attrs.evolve(drive, id=drive.id or f"d{index}") for index, drive in enumerate(drives))
    resources = Resources(drives=tuple(DriveResource(drive, drive.path, **changes) for drive in named))
    ends = DeviceEnds(drives=tuple(DriveEnd(fd) for fd in range(20, 20 + len(drives))))
    return words_of(plan_of(resources, drives=named), ends, transport)


def node_of(drive: DriveConfig, **changes: Any) -> dict[str, Any]:
    (text,) = values(drive_words(drive, **changes), "-blockdev")
    return dict(orjson.loads(text))


def test_without_devices_there_is_not_a_word() -> None:
    assert words_of(PLAN) == []


def test_each_drive_is_an_inherited_descriptor_and_bears_its_id_as_serial() -> None:
    words = drive_words(DriveConfig(path="/a"), DriveConfig(path="/b,c", id="data"))
    assert values(words, "-add-fd") == ["fd=20,set=0", "fd=21,set=1"]
    assert [orjson.loads(text)["filename"] for text in values(words, "-blockdev")] == ["/dev/fdset/0", "/dev/fdset/1"]
    assert values(words, "-device") == [
        "virtio-blk-device,id=disk0,drive=drive0,serial=d0,rerror=report,werror=report",
        "virtio-blk-device,id=disk1,drive=drive1,serial=data,rerror=report,werror=report",
    ]
    assert not any("/b" in word for word in words), "a file's name is no word of QEMU's"


def test_on_a_q35_the_same_devices_are_on_pci() -> None:
    (device,) = values(drive_words(DriveConfig(path="/a"), transport="pci"), "-device")
    assert device.startswith("virtio-blk-pci,")


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush"), [("writeback", False, False), ("none", True, False), ("unsafe", False, True)]
)
def test_a_cache_mode_says_whose_cache_and_whether_flushes_count(cache: Any, direct: bool, no_flush: bool) -> None:
    assert node_of(DriveConfig(path="/a", cache=cache))["cache"] == {"direct": direct, "no-flush": no_flush}


def test_a_drive_that_must_not_be_written_is_read_only_to_qemu_too() -> None:
    assert node_of(DriveConfig(path="/a", read_only=True))["read-only"] is True
    assert node_of(DriveConfig(path="/a"))["read-only"] is False


def test_discards_are_carried_out_or_not_even_offered() -> None:
    assert node_of(DriveConfig(path="/a"))["discard"] == "unmap"
    drive = DriveConfig(path="/a", discard=False)
    assert node_of(drive)["discard"] == "ignore"
    assert values(drive_words(drive), "-device")[0].endswith(",discard=off")


def test_a_drive_that_is_only_read_offers_neither_discard_nor_write_zeroes() -> None:
    words = drive_words(DriveConfig(path="/a", read_only=True))
    assert values(words, "-device")[0].endswith(",discard=off,write-zeroes=off")


def test_zeros_written_to_a_copy_are_not_stored() -> None:
    assert node_of(DriveConfig(path="/a", overlay=True))["detect-zeroes"] == "unmap"
    assert node_of(DriveConfig(path="/a"))["detect-zeroes"] == "off"


def test_a_qcow2_lies_on_its_file_and_both_are_cached_alike() -> None:
    node = node_of(DriveConfig(path="/a", cache="none"), format="qcow2")
    assert (node["driver"], node["file"]["driver"]) == ("qcow2", "file")
    assert node["cache"] == node["file"]["cache"] == {"direct": True, "no-flush": False}
    assert "filename" not in node


def test_a_block_device_is_driven_as_one() -> None:
    drive = DriveConfig(path="/dev/sdx", id="disk")
    resources = Resources(drives=(DriveResource(drive, drive.path),))
    words = words_of(plan_of(resources, drives=(drive,)), DeviceEnds(drives=(DriveEnd(9, is_block_device=True),)))
    assert orjson.loads(values(words, "-blockdev")[0])["driver"] == "host_device"


def test_a_user_network_is_a_helpers_stream_socket() -> None:
    plan = plan_of(Resources(net_fd=12, mac="02:00:00:00:00:07"), net=NetConfig())
    assert words_of(plan) == [
        *("-netdev", "stream,id=net0,server=off,addr.type=fd,addr.str=12"),
        *("-device", "virtio-net-device,id=net0,netdev=net0,mac=02:00:00:00:00:07,host_mtu=65520"),
    ]


def test_a_qemu_without_stream_netdevs_reads_the_same_bytes_by_its_older_one() -> None:
    plan = plan_of(Resources(net_fd=12), net=NetConfig())
    assert values(words_of(plan, version=(7, 1)), "-netdev") == ["socket,id=net0,fd=12"]


def test_a_tap_is_handed_over_open() -> None:
    plan = plan_of(Resources(net_fd=12), net=NetConfig(mode="tap", tap="tap0", mac="02:00:00:00:00:08"))
    words = words_of(plan, transport="pci")
    assert values(words, "-netdev") == ["tap,id=net0,fd=12"]
    assert values(words, "-device") == ["virtio-net-pci,id=net0,netdev=net0,mac=02:00:00:00:00:08,romfile="]


def test_the_balloon_offers_what_was_asked_for() -> None:
    assert words_of(plan_of(balloon=BalloonConfig())) == [
        "-device",
        "virtio-balloon-device,id=balloon0,deflate-on-oom=on,free-page-reporting=on",
    ]
    none = BalloonConfig(deflate_on_oom=False, free_page_reporting=False)
    assert values(words_of(plan_of(balloon=none)), "-device")[0].endswith("deflate-on-oom=off,free-page-reporting=off")


def test_free_page_hints_get_the_thread_that_qemu_wants_for_them() -> None:
    words = words_of(plan_of(balloon=BalloonConfig(free_page_hinting=True)))
    assert values(words, "-object") == ["iothread,id=hinting"]
    assert values(words, "-device")[0].endswith("free-page-hint=on,iothread=hinting")


def test_entropy_without_a_limit_has_no_budget() -> None:
    words = words_of(plan_of(rng=RngConfig(bytes_per_s=0)))
    assert words == ["-object", "rng-builtin,id=rng0", "-device", "virtio-rng-device,rng=rng0"]


def test_the_default_budget_of_entropy_is_a_burst_now_and_then() -> None:
    words = words_of(plan_of(rng=RngConfig()))
    assert values(words, "-device") == ["virtio-rng-device,rng=rng0,max-bytes=65011,period=62"]


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_the_guest_never_gets_more_entropy_than_the_rate_and_the_burst(rate: int, burst: int) -> None:
    budget = entropy_budget(RngConfig(bytes_per_s=rate, burst_bytes=burst))
    assert budget is not None
    quota, period_ms = budget
    assert 1 <= quota < 2**63
    assert 1 <= period_ms < 2**32
    assert quota * 1000 <= rate * period_ms
    assert burst == 0 or quota <= burst


def test_the_console_is_port_0_and_named_ports_follow() -> None:
    ends = DeviceEnds(ports={"console": 4, "bulk": 5, "log.1": 6})
    words = words_of(plan_of(console=ConsoleConfig(ports=("bulk", "log.1"))), ends)
    assert values(words, "-chardev") == ["socket,id=port0,fd=4", "socket,id=port1,fd=5", "socket,id=port2,fd=6"]
    assert values(words, "-device") == [
        "virtio-serial-device,id=serial0,max_ports=3",
        "virtconsole,bus=serial0.0,nr=0,chardev=port0,name=console",
        "virtserialport,bus=serial0.0,nr=1,chardev=port1,name=bulk",
        "virtserialport,bus=serial0.0,nr=2,chardev=port2,name=log.1",
    ]


def test_a_vsock_device_speaks_vhost_user() -> None:
    words = device_words(plan_of(vsock=VsockConfig()), "device", (7, 2), DeviceEnds(vsock=8))
    assert "socket,id=vsock0,fd=8" in values(words, "-chardev")
    assert "vhost-user-vsock-device,chardev=vsock0" in values(words, "-device")


def test_every_descriptor_is_named_for_the_child() -> None:
    ends = DeviceEnds(drives=(DriveEnd(3), DriveEnd(4)), ports={"console": 5, "bulk": 6}, vsock=7)
    assert ends.descriptors() == [3, 4, 5, 6, 7]
