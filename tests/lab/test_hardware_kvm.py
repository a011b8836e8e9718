"""The lab is what it promises: a KVM that runs ring-0 code on a (here emulated) processor, not in its own emulator."""

from __future__ import annotations

import os
from pathlib import Path

from asyncvmm.machine.kvm.calibrate import measure


def test_the_kernel_module_of_a_real_processor_is_loaded() -> None:
    assert Path("/sys/module/kvm_amd/parameters/npt").read_text().strip() == "Y"


def test_dev_kvm_opens_for_reading_and_writing() -> None:
    os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))


def test_ring_0_runs_faster_than_kvm_could_emulate_it() -> None:
    assert measure(limit_s=20).ring0_mips > 20
