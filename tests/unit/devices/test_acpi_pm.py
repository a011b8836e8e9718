from __future__ import annotations

import pytest

from asyncvmm.devices.acpi_pm import RESET, SLEEP_CONTROL, SLEEP_STATUS, AcpiPm

S5 = 5 << 2
ENABLE = 1 << 5


@pytest.fixture
def causes() -> list[str]:
    return []


@pytest.fixture
def registers(causes: list[str]) -> AcpiPm:
    return AcpiPm(shutdown=lambda: causes.append("shutdown"), reset=lambda: causes.append("reset"))


def test_entering_s5_shuts_down(registers: AcpiPm, causes: list[str]) -> None:
    registers.write(SLEEP_CONTROL, S5)
    assert causes == []
    registers.write(SLEEP_CONTROL, S5 | ENABLE)
    assert causes == ["shutdown"]


@pytest.mark.parametrize("sleep_type", [0, 1, 2, 3, 4, 6, 7])
def test_no_other_sleep_state_exists(registers: AcpiPm, causes: list[str], sleep_type: int) -> None:
    registers.write(SLEEP_CONTROL, sleep_type << 2 | ENABLE)
    assert causes == []


def test_bits_outside_the_sleep_fields_do_not_matter(registers: AcpiPm, causes: list[str]) -> None:
    registers.write(SLEEP_CONTROL, S5 | ENABLE | 0xC3)
    assert causes == ["shutdown"]


def test_only_the_reset_value_resets(registers: AcpiPm, causes: list[str]) -> None:
    for value in (0x00, 0x02, 0x06, 0xFF):
        registers.write(RESET, value)
    assert causes == []
    registers.write(RESET, 0x01)
    assert causes == ["reset"]


def test_clearing_the_wake_status_does_nothing_and_it_reads_zero(registers: AcpiPm, causes: list[str]) -> None:
    registers.write(SLEEP_STATUS, 0x80)
    assert [registers.read(offset) for offset in range(3)] == [0, 0, 0]
    assert causes == []


def test_restored_registers_work(registers: AcpiPm, causes: list[str]) -> None:
    restored = AcpiPm.from_state(registers.state(), lambda: causes.append("off"), lambda: causes.append("again"))
    restored.write(SLEEP_CONTROL, S5 | ENABLE)
    restored.write(RESET, 0x01)
    assert causes == ["off", "again"]
