"""Holds a VM with one vCPU that never runs, for as long as the lab lives; makes /run/held when it has them.

With the first VM, and the first vCPU whose local APIC is off, the kernel patches its own code (static keys), and back
with the last. QEMU 7.2 with one thread for each CPU can miss such a patch: a CPU then takes the same INT3 for ever.
With these held, VMs come and go without patching.
"""

from __future__ import annotations

import fcntl
import os
import signal

KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP = 0xAE01, 0xAE41, 0xAE60

kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
open("/run/held", "w").close()
signal.pause()
