"""Kernel command lines that boot the guest image quietly. Words from Linux's kernel-parameters.txt.

console: COM1. 8250.nr_uarts=1 keeps the kernel off COM2, the control line. panic=-1 resets at once, so that a panic
ends the boot instead of hanging it; reboot=a resets by the register that the ACPI tables name. quiet: each byte of
console output is an exit; loglevel=3 leaves errors out too, panics not. random.trust_cpu=on: no wait for entropy.
"""

from __future__ import annotations

from typing import Literal

_COMMON = "console=ttyS0 8250.nr_uarts=1 quiet loglevel=3 panic=-1 reboot=a random.trust_cpu=on"

_KVM = "tsc=reliable no_timer_check pci=off"
"""KVM's clock is the host's TSC; there is no PIT to check the timer against, and no PCI bus to scan."""


def default_cmdline(accel: Literal["kvm", "qemu"]) -> str:
    """What a guest gets that was not given a command line."""
    return f"{_COMMON} {_KVM}" if accel == "kvm" else _COMMON
