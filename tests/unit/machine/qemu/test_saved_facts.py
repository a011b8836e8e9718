"""What a machine must be to go on from a saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.command import QemuAccel, QemuBinary
from asyncvmm.machine.qemu.saved_facts import check, check_can_save, facts_of, regions, saved_machine, with_saved_mac
from asyncvmm.snapshot import codec
from asyncvmm.snapshot.memory_map import MemoryMap

QEMU = QemuBinary(Path("/usr/bin/qemu-system-x86_64"), (7, 2, 22), host_cpu="some CPU")
DRIVE = DriveConfig(path="image", id="disk")
PLAN = BootPlan(
    name="vm",
    memory_mib=256,
    vcpus=2,
    kernel=Path("/k"),
    initrd=None,
    tsc_khz=2_300_000,
    devices=DeviceConfig(
        drives=(DRIVE,), net=NetConfig(), balloon=BalloonConfig(), rng=RngConfig(), console=ConsoleConfig(ports=("a",))
    ),
    resources=Resources(drives=(DriveResource(DRIVE, Path("/image")),), net_fd=9, mac="02:00:00:00:00:01"),
)
MAP = MemoryMap(size=256 << 20)


def check_against(plan: BootPlan = PLAN, qemu: QemuBinary = QEMU, accel: QemuAccel = "tcg") -> None:
    """Check what was saved of PLAN, after it has been written and read."""
    cpu = codec.decode(codec.encode(facts_of(PLAN, QEMU, accel)))
    check(saved_machine(PLAN, cpu, b"state", MAP), facts_of(plan, qemu, accel))


def test_the_same_machine_may_go_on() -> None:
    check_against()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"kernel": Path("/elsewhere"), "cmdline": "debug", "appended": b"x"},
        {"tsc_khz": 2_300_100},
        {
            "resources": Resources(
                drives=(DriveResource(DRIVE, Path("/copy"), "qcow2"),), net_fd=12, mac="02:00:00:00:00:02"
            )
        },
    ],
)
def test_what_the_guest_does_not_see_may_differ(change: dict[str, Any]) -> None:
    check_against(attrs.evolve(PLAN, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vcpus": 4}, "restored vcpus: expected 2, found 4"),
        ({"memory_mib": 512}, "restored memory_mib: expected 256, found 512"),
        ({"tsc_khz": None}, "restored machine: expected microvm, found q35"),
        ({"tsc_khz": 2_301_000}, "restored TSC: expected 2300000 kHz, found 2301000 kHz"),
        ({"devices": attrs.evolve(PLAN.devices, rng=None)}, "restored devices"),
        ({"devices": attrs.evolve(PLAN.devices, console=ConsoleConfig(ports=("b",)))}, "restored devices"),
    ],
)
def test_what_the_guest_sees_may_not(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SnapshotMismatch) as caught:
        check_against(attrs.evolve(PLAN, **change))
    assert words in str(caught.value)


def test_only_a_qemu_of_the_same_release_reads_its_state() -> None:
    check_against(qemu=attrs.evolve(QEMU, version=(7, 2, 1)))
    with pytest.raises(SnapshotMismatch, match=r"expected 7\.2, found 8\.0"):
        check_against(qemu=attrs.evolve(QEMU, version=(8, 0, 0)))


def test_the_hosts_processor_matters_with_kvm_alone() -> None:
    other = attrs.evolve(QEMU, host_cpu="another CPU")
    check_against(qemu=other)
    with pytest.raises(SnapshotMismatch, match="expected some CPU, found another CPU"):
        check_against(qemu=other, accel="kvm")


def test_what_kvm_or_nobody_saved_is_refused() -> None:
    facts = facts_of(PLAN, QEMU, "tcg")
    saved = saved_machine(PLAN, facts, b"state", MAP)
    with pytest.raises(SnapshotMismatch, match="found one of kvm"):
        check(attrs.evolve(saved, accel="kvm"), facts)
    with pytest.raises(SnapshotMismatch, match="restored machine: expected None"):
        check(attrs.evolve(saved, cpu={}), facts)
    for sections in ({}, {"qemu": b""}):
        with pytest.raises(SnapshotDamaged, match="found none"):
            check(attrs.evolve(saved, sections=sections), facts)


def test_a_card_keeps_the_address_that_it_was_saved_with() -> None:
    other = attrs.evolve(PLAN, resources=attrs.evolve(PLAN.resources, mac="02:00:00:00:00:99"))
    saved = saved_machine(PLAN, facts_of(PLAN, QEMU, "tcg"), b"state", MAP)
    assert with_saved_mac(other, saved).resources == PLAN.resources
    without = attrs.evolve(other, devices=DeviceConfig())
    assert with_saved_mac(without, saved) is without
    for damaged in (7, "02:00:00:00:00:01,script=/tmp/x", "02:00:00:00:00:01\n"):
        with pytest.raises(SnapshotDamaged, match="MAC"):
            with_saved_mac(other, attrs.evolve(saved, cpu={"mac": damaged}))


def test_a_difference_and_a_vsock_device_cannot_be_saved() -> None:
    check_can_save(PLAN, None)
    with pytest.raises(SnapshotFailed, match="difference"):
        check_can_save(PLAN, "base")
    with pytest.raises(SnapshotFailed, match="vsock"):
        check_can_save(attrs.evolve(PLAN, devices=DeviceConfig(vsock=VsockConfig())), None)


@pytest.mark.parametrize(
    ("machine", "mib", "found"),
    [
        ("microvm", 256, [(0, 256)]),
        ("microvm", 3072, [(0, 3072)]),
        ("microvm", 4096, [(0, 3072), (4096, 1024)]),
        ("q35", 2048, [(0, 2048)]),
        ("q35", 2816, [(0, 2048), (4096, 768)]),
        ("q35", 4096, [(0, 2048), (4096, 2048)]),
    ],
)
def test_memory_lies_where_that_machine_has_it(machine: Any, mib: int, found: list[tuple[int, int]]) -> None:
    assert regions(mib, machine) == tuple((address << 20, size << 20) for address, size in found)
