"""For tests of devices, ours and others': the driver's half of a virtio device, without any virtual machine."""

from __future__ import annotations

from asyncvmm.testing.driver import Driver as Driver
from asyncvmm.testing.rings import DriverQueue as DriverQueue
from asyncvmm.testing.rings import Used as Used
