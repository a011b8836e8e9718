"""The KVM API in numbers: ioctl requests, capabilities and structure layouts, named as in <linux/kvm.h>.

Source: Documentation/virt/kvm/api.rst and the uapi headers of Linux, x86-64. Nothing here talks to the kernel.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum

KVM_API_VERSION = 12
_KVMIO = 0xAE
_IOC_WRITE, _IOC_READ = 1, 2


def _io(number: int) -> int:
    return (_KVMIO << 8) | number


def _iow(number: int, size: int) -> int:
    return (_IOC_WRITE << 30) | (size << 16) | (_KVMIO << 8) | number


def _ior(number: int, size: int) -> int:
    return (_IOC_READ << 30) | (size << 16) | (_KVMIO << 8) | number


def _iowr(number: int, size: int) -> int:
    return ((_IOC_READ | _IOC_WRITE) << 30) | (size << 16) | (_KVMIO << 8) | number


class KvmUserspaceMemoryRegion(Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class KvmDirtyLog(Structure):
    """struct kvm_dirty_log; ``dirty_bitmap`` is an address."""

    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("dirty_bitmap", c_uint64)]


class KvmEnableCap(Structure):
    """struct kvm_enable_cap."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class KvmPitConfig(Structure):
    """struct kvm_pit_config."""

    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class KvmIrqLevel(Structure):
    """struct kvm_irq_level."""

    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class KvmRegs(Structure):
    """struct kvm_regs."""

    _fields_ = [
        *((name, c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((name, c_uint64) for name in ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")),
        ("rip", c_uint64),
        ("rflags", c_uint64),
    ]


class KvmSegment(Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class KvmDtable(Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class KvmSregs(Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, KvmSegment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]),
        ("gdt", KvmDtable),
        ("idt", KvmDtable),
        *((name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class KvmCpuidEntry2(Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        *((name, c_uint32) for name in ["function", "index", "flags", "eax", "ebx", "ecx", "edx"]),
        ("padding", c_uint32 * 3),
    ]


MAX_CPUID_ENTRIES = 256


class KvmCpuid2(Structure):
    """struct kvm_cpuid2 with room for MAX_CPUID_ENTRIES."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", KvmCpuidEntry2 * MAX_CPUID_ENTRIES)]


class KvmMsrEntry(Structure):
    """struct kvm_msr_entry."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


MAX_MSR_ENTRIES = 64


class KvmMsrs(Structure):
    """struct kvm_msrs with room for MAX_MSR_ENTRIES."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32), ("entries", KvmMsrEntry * MAX_MSR_ENTRIES)]


class KvmLapicState(Structure):
    """struct kvm_lapic_state."""

    _fields_ = [("regs", c_uint8 * 1024)]


class KvmSignalMask(Structure):
    """struct kvm_signal_mask with the kernel's 8-byte sigset."""

    _pack_ = 4
    _fields_ = [("len", c_uint32), ("sigset", c_uint64)]


class KvmDeviceAttr(Structure):
    """struct kvm_device_attr."""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class KvmMpState(Structure):
    """struct kvm_mp_state."""

    _fields_ = [("mp_state", c_uint32)]


XSAVE_BYTES = 4096
"""struct kvm_xsave. KVM_GET_XSAVE2 gives more where KVM_CAP_XSAVE2 says so; KVM_SET_XSAVE reads as much then."""


class KvmXcrs(Structure):
    """struct kvm_xcrs."""

    _fields_ = [("bytes", c_uint8 * 392)]


class KvmDebugregs(Structure):
    """struct kvm_debugregs."""

    _fields_ = [("bytes", c_uint8 * 128)]


class KvmVcpuEvents(Structure):
    """struct kvm_vcpu_events. ``flags`` says which fields are valid: KVM_SET_VCPU_EVENTS wants it as it was got."""

    _fields_ = [("exceptions", c_uint8 * 20), ("flags", c_uint32), ("rest", c_uint8 * 40)]


class KvmIrqchip(Structure):
    """struct kvm_irqchip."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("state", c_uint8 * 512)]


class KvmPitState2(Structure):
    """struct kvm_pit_state2."""

    _fields_ = [("bytes", c_uint8 * 112)]


class KvmClockData(Structure):
    """struct kvm_clock_data."""

    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


MAX_MSR_INDICES = 1024


class KvmMsrList(Structure):
    """struct kvm_msr_list with room for MAX_MSR_INDICES."""

    _fields_ = [("nmsrs", c_uint32), ("indices", c_uint32 * MAX_MSR_INDICES)]


class KvmIoeventfd(Structure):
    """struct kvm_ioeventfd."""

    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class KvmIrqfd(Structure):
    """struct kvm_irqfd."""

    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class Request(IntEnum):
    """ioctl requests this VMM makes. KVM_GET/SET_CPUID2 and MSR calls encode the header's size alone."""

    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_GET_MSR_INDEX_LIST = _iowr(0x02, 4)
    KVM_CHECK_EXTENSION = _io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    KVM_GET_SUPPORTED_CPUID = _iowr(0x05, 8)
    KVM_CREATE_VCPU = _io(0x41)
    KVM_GET_DIRTY_LOG = _iow(0x42, sizeof(KvmDirtyLog))
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, sizeof(KvmUserspaceMemoryRegion))
    KVM_SET_TSS_ADDR = _io(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
    KVM_CREATE_IRQCHIP = _io(0x60)
    KVM_IRQ_LINE = _iow(0x61, sizeof(KvmIrqLevel))
    KVM_GET_IRQCHIP = _iowr(0x62, sizeof(KvmIrqchip))
    KVM_SET_IRQCHIP = _ior(0x63, sizeof(KvmIrqchip))
    KVM_IRQFD = _iow(0x76, sizeof(KvmIrqfd))
    KVM_CREATE_PIT2 = _iow(0x77, sizeof(KvmPitConfig))
    KVM_IOEVENTFD = _iow(0x79, sizeof(KvmIoeventfd))
    KVM_SET_CLOCK = _iow(0x7B, sizeof(KvmClockData))
    KVM_GET_CLOCK = _ior(0x7C, sizeof(KvmClockData))
    KVM_RUN = _io(0x80)
    KVM_GET_REGS = _ior(0x81, sizeof(KvmRegs))
    KVM_SET_REGS = _iow(0x82, sizeof(KvmRegs))
    KVM_GET_SREGS = _ior(0x83, sizeof(KvmSregs))
    KVM_SET_SREGS = _iow(0x84, sizeof(KvmSregs))
    KVM_GET_MSRS = _iowr(0x88, 8)
    KVM_SET_MSRS = _iow(0x89, 8)
    KVM_SET_SIGNAL_MASK = _iow(0x8B, 4)
    KVM_GET_LAPIC = _ior(0x8E, sizeof(KvmLapicState))
    KVM_SET_LAPIC = _iow(0x8F, sizeof(KvmLapicState))
    KVM_SET_CPUID2 = _iow(0x90, 8)
    KVM_GET_CPUID2 = _iowr(0x91, 8)
    KVM_GET_MP_STATE = _ior(0x98, sizeof(KvmMpState))
    KVM_SET_MP_STATE = _iow(0x99, sizeof(KvmMpState))
    KVM_GET_PIT2 = _ior(0x9F, sizeof(KvmPitState2))
    KVM_SET_PIT2 = _iow(0xA0, sizeof(KvmPitState2))
    KVM_GET_VCPU_EVENTS = _ior(0x9F, sizeof(KvmVcpuEvents))
    KVM_SET_VCPU_EVENTS = _iow(0xA0, sizeof(KvmVcpuEvents))
    KVM_GET_DEBUGREGS = _ior(0xA1, sizeof(KvmDebugregs))
    KVM_SET_DEBUGREGS = _iow(0xA2, sizeof(KvmDebugregs))
    KVM_SET_TSC_KHZ = _io(0xA2)
    KVM_GET_TSC_KHZ = _io(0xA3)
    KVM_GET_XSAVE = _ior(0xA4, XSAVE_BYTES)
    KVM_SET_XSAVE = _iow(0xA5, XSAVE_BYTES)
    KVM_GET_XCRS = _ior(0xA6, sizeof(KvmXcrs))
    KVM_SET_XCRS = _iow(0xA7, sizeof(KvmXcrs))
    KVM_ENABLE_CAP = _iow(0xA3, sizeof(KvmEnableCap))
    KVM_KVMCLOCK_CTRL = _io(0xAD)
    KVM_RESET_DIRTY_RINGS = _io(0xC7)
    KVM_GET_XSAVE2 = _ior(0xCF, XSAVE_BYTES)
    KVM_SET_DEVICE_ATTR = _iow(0xE1, sizeof(KvmDeviceAttr))
    KVM_GET_DEVICE_ATTR = _iow(0xE2, sizeof(KvmDeviceAttr))


class Capability(IntEnum):
    """Extensions asked for with KVM_CHECK_EXTENSION."""

    KVM_CAP_IRQCHIP = 0
    KVM_CAP_USER_MEMORY = 3
    KVM_CAP_XCRS = 56
    KVM_CAP_TSC_CONTROL = 60
    KVM_CAP_MAX_VCPUS = 66
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_DIRTY_LOG_RING = 192
    KVM_CAP_XSAVE2 = 208
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223


KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64
"""Where a vCPU's dirty ring is in its descriptor, in pages."""
KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_PIT_SPEAKER_DUMMY = 1
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
