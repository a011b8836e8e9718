"""The task register under an emulated AMD-V.

AMD-V keeps TR's type without its busy bit, and KVM shows it with the bit set (svm_get_segment), which a real processor
takes back. QEMU's TCG, as a host's processor, takes what VMRUN loads for the type, and refuses every port of the I/O
permission bitmap to a task whose type is not 9, an available TSS (its check_io): Linux grants ports by that bitmap.
"""

from __future__ import annotations

import re
from pathlib import Path

from asyncvmm.machine.kvm.abi import KvmSregs

_MODEL = re.compile(r"^model name\s*:\s*QEMU TCG CPU", re.MULTILINE)
_BUSY = 2


def is_tcg(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the host's processor is QEMU's emulated one. KVM does not tell its brand."""
    try:
        with cpuinfo.open() as file:
            return _MODEL.search(file.read(4096)) is not None
    except OSError:
        return False


def without_busy(sregs: bytes) -> bytes:
    """The registers with TR as AMD-V keeps it."""
    changed = KvmSregs.from_buffer_copy(sregs)
    changed.tr.type &= ~_BUSY
    return bytes(changed)
