from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.x86.layout import MP_TABLE_ADDRESS, RESET_VECTOR, mmio_device
from asyncvmm.x86.mptable import mp_tables, virtio_mmio_cmdline

ENTRY_SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries_of(block: bytes) -> list[bytes]:
    """The configuration table's entries, found as a kernel finds them, checksums verified."""
    assert block[:4] == b"_MP_"
    assert sum(block[:16]) % 256 == 0
    offset = struct.unpack_from("<I", block, 4)[0] - MP_TABLE_ADDRESS
    signature, length = struct.unpack_from("<4sH", block, offset)
    table = block[offset : offset + length]
    assert signature == b"PCMP"
    assert len(table) == length
    assert sum(table) % 256 == 0
    entries = []
    at = 44
    while at < length:
        entries.append(table[at : at + ENTRY_SIZES[table[at]]])
        at += len(entries[-1])
    assert len(entries) == struct.unpack_from("<H", table, 34)[0]
    return entries


@settings(max_examples=30)
@given(vcpus=st.integers(1, 254))
def test_every_vcpu_is_listed_and_the_first_one_boots(vcpus: int) -> None:
    block = mp_tables(vcpus)
    processors = [entry for entry in entries_of(block) if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(vcpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (vcpus - 1)
    assert MP_TABLE_ADDRESS + len(block) <= RESET_VECTOR


def test_lines_go_to_the_ioapic_pin_of_the_same_number() -> None:
    entries = entries_of(mp_tables(1))
    ioapic = next(entry for entry in entries if entry[0] == 2)
    lines = [entry for entry in entries if entry[0] == 3]
    assert {entry[6] for entry in lines} == {ioapic[1]}
    assert [entry[5] for entry in lines] == [entry[7] for entry in lines]
    assert {entry[5] for entry in lines} == set(range(24)) - {2}


def test_the_command_line_names_each_device_s_size_address_and_line() -> None:
    words = virtio_mmio_cmdline([mmio_device(0), mmio_device(1)])
    assert words == "virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6"
    assert virtio_mmio_cmdline([]) == ""
