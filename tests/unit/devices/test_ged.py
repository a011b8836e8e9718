from __future__ import annotations

import pytest

from asyncvmm.devices.ged import Ged, GedState
from asyncvmm.errors import ConfigError

POWER_BUTTON, NEW_GENERATION = 0x01, 0x02
HEED = 0x01


def test_the_power_button_pulses_the_line_and_is_read_once() -> None:
    levels: list[bool] = []
    ged = Ged(levels.append)
    assert ged.read(0) == 0
    ged.press_power_button()
    assert levels == [True, False]
    assert ged.read(0) == POWER_BUTTON
    assert ged.read(0) == 0


def test_each_press_is_an_edge_though_the_guest_has_not_read_the_last() -> None:
    levels: list[bool] = []
    ged = Ged(levels.append)
    ged.press_power_button()
    ged.press_power_button()
    assert levels == [True, False] * 2
    assert ged.read(0) == POWER_BUTTON


def test_a_guest_cannot_press_its_own_button() -> None:
    levels: list[bool] = []
    ged = Ged(levels.append)
    for value in range(256):
        ged.write(0, value)
    assert (levels, ged.read(0)) == ([], 0)


def test_a_pending_event_outlives_a_snapshot() -> None:
    levels: list[bool] = []
    ged = Ged(lambda level: None)
    assert Ged.from_state(ged.state(), levels.append).read(0) == 0
    assert levels == []
    ged.press_power_button()
    restored = Ged.from_state(ged.state(), levels.append)
    assert levels == [True, False]
    assert restored.read(0) == POWER_BUTTON


def test_a_state_with_unknown_events_is_refused() -> None:
    with pytest.raises(ConfigError):
        GedState(pending=4)
    with pytest.raises(ConfigError):
        GedState(heeds_generation=1)  # type: ignore[arg-type]


def test_a_driver_says_that_it_heeds_the_generation_and_is_told_of_a_new_one() -> None:
    levels: list[bool] = []
    ged = Ged(lambda level: None)
    ged.write(0, HEED)
    restored = Ged.from_state(ged.state(), levels.append)
    assert restored.heeds_generation
    restored.announce_generation()
    restored.press_power_button()
    assert levels == [True, False] * 2
    assert restored.read(0) == NEW_GENERATION | POWER_BUTTON


@pytest.mark.parametrize("value", [0, 2, 3, 0xFE, 0xFF])
def test_no_other_byte_says_that_the_generation_is_heeded(value: int) -> None:
    ged = Ged(lambda level: None)
    ged.write(0, value)
    assert not ged.heeds_generation
