"""No device is imported on the event loop: all of it is there before."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from asyncvmm import VMConfig, RngConfig
from asyncvmm.device_imports import import_devices
import asyncvmm.machine.{accel}.machine
config = VMConfig(drives=["x"], net="user", balloon=True, vsock=True, rng=True, virtio_console=True)
import_devices(config.devices, "{accel}")
before = set(sys.modules)
{use}
print(sorted(name for name in set(sys.modules) - before if name.startswith("asyncvmm")))
"""
USE_KVM = """
from asyncvmm.machine.kvm import devices
import inspect, re
for name in re.findall(r"^ +from (asyncvmm[.a-z_]+) import", inspect.getsource(devices), re.M):
    __import__(name)
"""


@pytest.mark.parametrize(("accel", "use"), [("kvm", USE_KVM), ("qemu", "import asyncvmm.resources, asyncvmm.net.user")])
def test_nothing_is_left_to_import_when_devices_are_fitted(accel: str, use: str) -> None:
    program = PROGRAM.format(accel=accel, use=use)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
