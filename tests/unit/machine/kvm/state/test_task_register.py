"""The task register is saved as AMD-V keeps it where the processor is emulated, and only there."""

from __future__ import annotations

from pathlib import Path

from asyncvmm.machine.kvm.abi import KvmSregs
from asyncvmm.machine.kvm.state.task_register import is_tcg, without_busy


def test_only_the_busy_bit_goes() -> None:
    sregs = KvmSregs()
    sregs.tr.type, sregs.tr.limit, sregs.cs.type = 11, 0x4087, 11
    changed = KvmSregs.from_buffer_copy(without_busy(bytes(sregs)))
    assert (changed.tr.type, changed.tr.limit, changed.cs.type) == (9, 0x4087, 11)


def test_an_emulated_processor_is_known_by_its_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n")
    assert is_tcg(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some other QEMU TCG CPU\n")
    assert not is_tcg(cpuinfo)
    assert not is_tcg(tmp_path / "nothing")
