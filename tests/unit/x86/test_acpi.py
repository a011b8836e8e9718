from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.x86.acpi import acpi_tables, dsdt, fadt, madt
from asyncvmm.x86.layout import ACPI_AREA_END, RSDP_ADDRESS, mmio_device
from tests.support.requirements import require

ALL_DEVICES = [mmio_device(slot) for slot in range(19)]


def tables_found(block: bytes) -> dict[bytes, bytes]:
    """The tables a kernel finds from the RSDP on, by signature; every pointer followed, every checksum verified."""
    assert block[:8] == b"RSD PTR "
    assert sum(block[:20]) % 256 == sum(block[:36]) % 256 == 0
    xsdt = table_at(block, struct.unpack_from("<Q", block, 24)[0])
    addresses = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
    tables = [table_at(block, address) for address in addresses]
    tables += [table_at(block, struct.unpack_from("<Q", table, 140)[0]) for table in tables if table[:4] == b"FACP"]
    return {table[:4]: table for table in tables}


def table_at(block: bytes, address: int) -> bytes:
    offset = address - RSDP_ADDRESS
    length: int = struct.unpack_from("<I", block, offset + 4)[0]
    table = block[offset : offset + length]
    assert len(table) == length
    assert sum(table) % 256 == 0
    return table


@settings(max_examples=30)
@given(vcpus=st.integers(1, 254), devices=st.integers(0, 19))
def test_every_table_is_found_whole_with_a_checksum_of_zero(vcpus: int, devices: int) -> None:
    block = acpi_tables(vcpus, ALL_DEVICES[:devices])
    assert set(tables_found(block)) == {b"FACP", b"APIC", b"DSDT"}
    assert RSDP_ADDRESS + len(block) <= ACPI_AREA_END


def test_the_rsdp_stands_on_a_16_byte_boundary_of_the_area_the_kernel_scans() -> None:
    assert RSDP_ADDRESS % 16 == 0
    assert 0xE0000 <= RSDP_ADDRESS < 0x100000


def test_the_fadt_is_hardware_reduced_with_reset_and_sleep_registers() -> None:
    table = fadt(0xE0100)
    flags: int = struct.unpack_from("<I", table, 112)[0]
    assert flags & 1 << 20
    assert flags & 1 << 10
    assert table[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, 0x602, 1)
    assert table[244:268] == struct.pack("<BBBBQBBBBQ", 1, 8, 0, 1, 0x600, 1, 8, 0, 1, 0x601)


def test_the_fadt_denies_8042_vga_and_rtc() -> None:
    boot_architecture: int = struct.unpack_from("<H", fadt(0), 109)[0]
    assert boot_architecture == 0x24


def test_the_madt_names_every_vcpu_and_overrides_no_line() -> None:
    table = madt(3)
    kinds = []
    offset = 44
    while offset < len(table):
        kinds.append(table[offset : offset + table[offset + 1]])
        offset += table[offset + 1]
    assert [entry[3] for entry in kinds if entry[0] == 0] == [0, 1, 2]
    assert [entry[0] for entry in kinds] == [0, 0, 0, 1, 4]
    assert kinds[-1] == bytes([4, 6, 0xFF, 0, 0, 1])


def test_com2_is_not_declared() -> None:
    assert struct.pack("<HH", 0x3F8, 0x3F8) in dsdt()
    assert struct.pack("<HH", 0x2F8, 0x2F8) not in dsdt()


@pytest.fixture(scope="module")
def iasl() -> str:
    require("iasl")
    return "iasl"


@pytest.fixture(scope="module")
def disassembly(iasl: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("acpi")
    (directory / "dsdt.aml").write_bytes(dsdt(ALL_DEVICES))
    subprocess.run([iasl, "-d", "dsdt.aml"], cwd=directory, check=True, capture_output=True)
    compiled = subprocess.run([iasl, "dsdt.dsl"], cwd=directory, check=False, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout, compiled.stdout + compiled.stderr
    return " ".join((directory / "dsdt.dsl").read_text().split())


def test_acpica_reads_s5_and_com1_from_the_dsdt(disassembly: str) -> None:
    assert "Name (\\_S5, Package (0x04) // _S5_: S5 System State { 0x05, Zero, Zero, Zero })" in disassembly
    assert 'EisaId ("PNP0501")' in disassembly
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }" in disassembly


def test_acpica_reads_every_virtio_device_with_its_address_line_and_uid(disassembly: str) -> None:
    assert disassembly.count('Name (_HID, "LNRO0005")') == 19
    for device in ALL_DEVICES:
        assert f"0x{device.address:08X}, // Address Base 0x00001000, // Address Length" in disassembly
        assert f"0x{device.gsi:08X}, }}" in disassembly
    assert "Name (_UID, 0x12)" in disassembly


def test_acpica_reads_the_event_device_that_presses_the_power_button(disassembly: str) -> None:
    assert 'Name (_HID, "ACPI0013"' in disassembly
    assert "OperationRegion (EVTR, SystemIO, 0x0603, One)" in disassembly
    assert "If ((Local0 & One)) { Notify (\\_SB.PWRB, 0x80)" in disassembly


def test_acpica_reads_the_generation_id_whose_address_is_told_to_who_says_that_it_looks(disassembly: str) -> None:
    assert '"VM_Gen_Counter", "VMGENCTR"' in disassembly
    method = "Method (ADDR, 0, Serialized) { \\_SB.GED.EVTS = One Return (Package (0x02) { 0x000EF000, Zero }) }"
    assert method in disassembly
    assert "If ((Local0 & 0x02)) { Notify (\\_SB.VGEN, 0x80)" in disassembly


@pytest.mark.parametrize(("name", "table"), [("facp", fadt(0xE0100)), ("apic", madt(4))])
def test_acpica_decodes_the_table_without_complaint(iasl: str, tmp_path: Path, name: str, table: bytes) -> None:
    (tmp_path / f"{name}.aml").write_bytes(table)
    done = subprocess.run([iasl, "-d", f"{name}.aml"], cwd=tmp_path, check=True, capture_output=True, text=True)
    text = (tmp_path / f"{name}.dsl").read_text()
    for complaint in ("Invalid", "Unknown", "Incorrect", "Error", "Warning"):
        assert complaint not in done.stderr + text
