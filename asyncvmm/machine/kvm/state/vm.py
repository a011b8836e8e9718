"""What of a VM's state is no vCPU's: its interrupt controllers, its timer, its clock.

Facts: KVM_GET_IRQCHIP, KVM_GET_PIT2 and KVM_GET_CLOCK in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
from typing import Final

import attrs

from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.machine.kvm.abi import KvmClockData, KvmIrqchip, KvmPitState2, Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.state.fields import Fields
from asyncvmm.snapshot.codec import encode

IRQCHIPS: Final = ("pic_master", "pic_slave", "ioapic")
"""In the order of their chip_id."""

_STATE_BYTES = KvmIrqchip.state.size


@attrs.frozen(kw_only=True)
class VmState:
    """A saved VM: KVM's structures as bytes, those of the interrupt controllers without their headers.

    clock: kvmclock in ns. host_tsc: the host's time stamp counter at that moment, None where it is not known.
    """

    pic_master: bytes
    pic_slave: bytes
    ioapic: bytes
    pit: bytes
    clock: int
    host_tsc: int | None

    @classmethod
    def of(cls, section: bytes) -> VmState:
        """A section, checked. Raises SnapshotDamaged."""
        fields = Fields.of("vm", section)
        return cls(
            pic_master=fields.exactly("pic_master", _STATE_BYTES),
            pic_slave=fields.exactly("pic_slave", _STATE_BYTES),
            ioapic=fields.exactly("ioapic", _STATE_BYTES),
            pit=fields.exactly("pit", ctypes.sizeof(KvmPitState2)),
            clock=fields.integer("clock"),
            host_tsc=fields.integer_or_none("host_tsc"),
        )

    def encode(self) -> bytes:
        """The section."""
        return encode({attribute.name: getattr(self, attribute.name) for attribute in attrs.fields(type(self))})

    def irqchips(self) -> list[bytes]:
        """What KVM_SET_IRQCHIP takes, in the order of IRQCHIPS."""
        states = (self.pic_master, self.pic_slave, self.ioapic)
        return [
            bytes(KvmIrqchip(chip, 0, (ctypes.c_uint8 * _STATE_BYTES)(*state))) for chip, state in enumerate(states)
        ]


def save_vm(fd: int) -> bytes:
    """The section of a VM whose vCPUs stand still; see machine.py for when. Raises KvmIoctlError."""
    return read_vm(fd).encode()


def read_vm(fd: int) -> VmState:
    """See save_vm."""
    pit, clock = KvmPitState2(), KvmClockData()
    ioctl(fd, Request.KVM_GET_PIT2, pit)
    ioctl(fd, Request.KVM_GET_CLOCK, clock)
    sample = clock_sample()
    chips = [KvmIrqchip(chip_id=chip) for chip in range(len(IRQCHIPS))]
    for chip in chips:
        ioctl(fd, Request.KVM_GET_IRQCHIP, chip)
    master, slave, ioapic = (bytes(chip.state) for chip in chips)
    return VmState(
        pic_master=master,
        pic_slave=slave,
        ioapic=ioapic,
        pit=bytes(pit),
        clock=clock.clock,
        host_tsc=None if sample is None else sample.tsc,
    )
