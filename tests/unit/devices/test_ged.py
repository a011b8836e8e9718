from __future__ import annotations

import pytest

from asyncvmm.devices.ged import Ged, GedState
from asyncvmm.errors import ConfigError

POWER_BUTTON = 0x01


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
    ged.write(0, 0xFF)
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
        GedState(pending=2)
