"""The doctor: one fix for each thing that is wrong, a report that is one JSON object, a page that says the same."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import orjson
import pytest
from rich.console import Console

from asyncvmm.doctor import DoctorReport, diagnose, render
from asyncvmm.doctor.host import parse_cpuinfo
from asyncvmm.doctor.remedies import find_problems
from asyncvmm.doctor.report import (
    VERDICTS,
    DeviceReport,
    HostReport,
    ImageReport,
    ImageState,
    KvmReport,
    Problem,
    QemuReport,
)

HOST = HostReport(
    kernel="6.1.0",
    architecture="x86_64",
    cpu_model="A Processor",
    cores=2,
    memory_mib=4096,
    virtualization="vmx",
    nested=False,
    kvm_module=False,
)
DEVICE = DeviceReport(path=Path("/dev/kvm"), present=True, character_device=True, readable=True, writable=True)
FAST = KvmReport(
    device=DEVICE, verdict="fast", api_version=12, capabilities={"KVM_CAP_IRQCHIP": 1}, ring0_mips=2000.0, exit_us=3.0
)
ABSENT = KvmReport(device=DeviceReport(path=Path("/dev/kvm"), present=False), verdict="absent", found="no such file")
UNUSABLE = attrs.evolve(
    FAST, verdict="unusable", ring0_mips=None, exit_us=None, expected="it opens", found="it does not"
)
QEMU = QemuReport(verdict="usable", path=Path("/usr/bin/qemu-system-x86_64"), version="7.2.22")
NO_QEMU = QemuReport(verdict="absent", expected="qemu-system-x86_64 on PATH", found="no qemu-system-x86_64")
IMAGE = ImageReport(name="default", state="built", kernel="6.1.0-1-cloud-amd64")


def problems(
    *,
    host: HostReport = HOST,
    kvm: KvmReport = FAST,
    qemu: QemuReport = QEMU,
    image: ImageReport = IMAGE,
    commands: tuple[str, ...] = ("apt-get",),
) -> list[Problem]:
    return find_problems(host, kvm, qemu, image, commands.__contains__)


def only_fix(found: list[Problem]) -> str:
    (problem,) = found
    return problem.fix


def test_a_host_where_all_is_well_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("host", "fix"),
    [
        (HOST, "modprobe kvm_intel"),
        (attrs.evolve(HOST, virtualization="svm"), "modprobe kvm_amd"),
        (attrs.evolve(HOST, virtualization="svm", nested=True), "modprobe kvm_amd"),
        (attrs.evolve(HOST, virtualization=None, nested=True), "nested virtualization"),
        (attrs.evolve(HOST, virtualization=None), "firmware"),
        (attrs.evolve(HOST, kvm_module=True), "--device /dev/kvm"),
        (attrs.evolve(HOST, architecture="aarch64"), "x86-64 host"),
    ],
)
def test_what_to_do_where_kvm_is_absent_depends_on_the_host(host: HostReport, fix: str) -> None:
    assert fix in only_fix(problems(host=host, kvm=ABSENT))


DENIED = attrs.evolve(DEVICE, readable=False, writable=False)


@pytest.mark.parametrize(
    ("kvm", "fix"),
    [
        (attrs.evolve(UNUSABLE, device=attrs.evolve(DENIED, group="kvm")), "usermod -aG kvm $USER"),
        (attrs.evolve(UNUSABLE, device=attrs.evolve(DENIED, group="kvm", joined=True)), "log out"),
        (attrs.evolve(UNUSABLE, device=DENIED), "chgrp kvm /dev/kvm && chmod 660 /dev/kvm"),
        (attrs.evolve(UNUSABLE, device=attrs.evolve(DEVICE, character_device=False)), "mknod /dev/kvm c 10 232"),
        (attrs.evolve(UNUSABLE, found="permission denied"), "--device /dev/kvm"),
        (attrs.evolve(UNUSABLE, api_version=None), "mknod /dev/kvm c 10 232"),
        (attrs.evolve(UNUSABLE, api_version=11, capabilities={}), "newer kernel"),
        (attrs.evolve(UNUSABLE, capabilities={"KVM_CAP_IRQCHIP": 0}), "newer kernel"),
        (UNUSABLE, "modprobe -r kvm_intel && modprobe kvm_intel"),
    ],
)
def test_what_to_do_where_kvm_is_unusable_depends_on_why(kvm: KvmReport, fix: str) -> None:
    assert fix in only_fix(problems(kvm=kvm))


def test_slow_kvm_is_told_with_its_number() -> None:
    (problem,) = problems(kvm=attrs.evolve(FAST, verdict="slow", ring0_mips=1.9))
    assert "1.9 million" in problem.found
    assert "nested virtualization" in problem.fix


def test_missing_qemu_is_a_problem_only_where_kvm_is_not_fast() -> None:
    assert problems(qemu=NO_QEMU) == []
    assert len(problems(kvm=ABSENT, qemu=NO_QEMU)) == 2


@pytest.mark.parametrize(
    ("qemu", "commands", "fix"),
    [
        (NO_QEMU, ("apt-get",), "apt-get install qemu-system-x86"),
        (NO_QEMU, ("dnf",), "dnf install qemu-system-x86-core"),
        (NO_QEMU, (), "install QEMU for x86-64 (qemu-system-x86_64)"),
        (attrs.evolve(NO_QEMU, verdict="unusable"), ("apt-get",), "6.0 or newer"),
        (attrs.evolve(NO_QEMU, override="/nowhere"), ("apt-get",), "unset ASYNCVMM_QEMU"),
    ],
)
def test_what_to_do_about_qemu_depends_on_what_is_wrong(qemu: QemuReport, commands: tuple[str, ...], fix: str) -> None:
    assert fix in problems(kvm=ABSENT, qemu=qemu, commands=commands)[-1].fix


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_an_image_that_cannot_be_used_is_to_be_built(state: ImageState) -> None:
    image = attrs.evolve(IMAGE, state=state)
    assert only_fix(problems(image=image)) == "asyncvmm image build"


def test_the_first_processor_of_cpuinfo_is_read() -> None:
    text = "model name\t: A: B\nflags\t\t: fpu vmx\nbogus\n\nmodel name\t: other\n"
    assert parse_cpuinfo(text) == {"model name": "A: B", "flags": "fpu vmx"}
    assert parse_cpuinfo("") == {}


# -- real files, as they could be on a host ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def page(report: DoctorReport) -> str:
    console = Console(file=io.StringIO(), width=400)
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_kvm_and_qemu_the_report_says_that_nothing_can_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCVMM_QEMU", str(tmp_path / "qemu"))
    report = diagnose(kvm_path=tmp_path / "kvm")
    assert (report.kvm.verdict, report.qemu.verdict, report.image.state) == ("absent", "absent", "missing")
    assert report.choice.accel is None
    assert not report.ready
    assert [problem.fix for problem in report.problems][1:] == ["unset ASYNCVMM_QEMU", "asyncvmm image build"]


@pytest.mark.parametrize("kind", ["file", "directory", "null"])
def test_what_is_not_kvm_is_reported_as_unusable(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/null") if kind == "null" else tmp_path / "kvm"
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    report = diagnose(kvm_path=path)
    assert report.kvm.verdict == "unusable"
    assert report.kvm.device.character_device == (kind == "null")
    assert "mknod" in report.problems[0].fix


@pytest.fixture
def readable_to_all() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


AS_NOBODY = """
import os, sys
from pathlib import Path
from asyncvmm.accel import probe_kvm
from asyncvmm.doctor.kvm import inspect_kvm
path = Path(sys.argv[1])
probe_kvm(path)  # imports the rest while it may: the checkout need not be everybody's to read
os.getuid() or os.setuid(65534)
report = inspect_kvm(path, probe_kvm(path))
print(report.verdict, report.device.readable, report.device.writable, report.found)
"""


def test_a_user_without_permission_is_told_so(readable_to_all: Path) -> None:
    path = readable_to_all / "kvm"
    path.touch()
    path.chmod(0)
    command = [sys.executable, "-c", AS_NOBODY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("unusable False False permission denied")


def test_a_qemu_too_old_is_reported_as_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho QEMU emulator version 4.2.0\n")
    old.chmod(0o755)
    monkeypatch.setenv("ASYNCVMM_QEMU", str(old))
    report = diagnose(kvm_path=tmp_path / "kvm")
    assert report.qemu.verdict == "unusable"
    assert report.qemu.found == "4.2.0"


def test_an_image_whose_files_are_gone_is_reported_as_damaged(own_home: Path) -> None:
    (own_home / "images").mkdir(parents=True)
    os.symlink(".built/gone", own_home / "images" / "default")
    assert diagnose(kvm_path=own_home / "kvm").image.state == "damaged"


def test_an_image_name_that_is_none_is_reported_and_not_raised(own_home: Path) -> None:
    report = diagnose(kvm_path=own_home / "kvm", image_name="../..")
    assert report.image.state != "built"


def test_the_report_is_one_json_object_of_plain_values(tmp_path: Path) -> None:
    report = diagnose(kvm_path=tmp_path / "kvm")
    read = orjson.loads(orjson.dumps(report.to_dict()))
    assert read["v"] == 1
    assert read["ready"] is report.ready
    assert read["kvm"]["device"]["path"] == str(tmp_path / "kvm")
    assert read["host"]["kernel"] == os.uname().release
    assert read["problems"][0].keys() == {"what", "found", "fix"}


def test_the_page_explains_every_verdict_and_names_every_fix(tmp_path: Path) -> None:
    report = diagnose(kvm_path=tmp_path / "kvm")
    text = page(report)
    assert all(meaning in text for meaning in VERDICTS.values())
    assert "> absent" in text
    assert all(problem.fix in text for problem in report.problems)


def test_the_page_prints_what_it_found_to_the_letter(tmp_path: Path) -> None:
    report = diagnose(kvm_path=tmp_path / "[red]kvm[/red]")
    assert "[red]kvm[/red]" in page(report)
