from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.i8042 import COMMAND, DATA, I8042, PORT_B, STATUS, I8042State
from asyncvmm.errors import ConfigError

OBF, IBF = 0x01, 0x02


@pytest.fixture
def resets() -> list[None]:
    return []


@pytest.fixture
def controller(resets: list[None]) -> I8042:
    return I8042(lambda: resets.append(None))


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xF2, 0xFC])
def test_pulsing_the_reset_line_resets(controller: I8042, resets: list[None], command: int) -> None:
    controller.write(COMMAND, command)
    assert len(resets) == 1


@pytest.mark.parametrize("command", [0x20, 0x60, 0xAA, 0xD1, 0xEE, 0xFF, 0xFD, 0x00])
def test_other_commands_do_not_reset(controller: I8042, resets: list[None], command: int) -> None:
    controller.write(COMMAND, command)
    assert resets == []


def test_the_output_ports_reset_bit_resets_when_it_is_cleared(controller: I8042, resets: list[None]) -> None:
    controller.write(DATA, 0x00)
    controller.write(COMMAND, 0xD1)
    controller.write(DATA, 0xDF)
    controller.write(DATA, 0x00)
    assert resets == []
    controller.write(COMMAND, 0xD1)
    controller.write(DATA, 0xDE)
    assert len(resets) == 1


def test_linux_gives_up_on_the_controller_after_17_looks(controller: I8042) -> None:
    looks = 0
    while controller.read(STATUS) & OBF and looks < 17:  # i8042_flush: a buffer of 16 that never empties
        assert controller.read(DATA) == 0
        looks += 1
    assert looks == 17


def test_a_guest_about_to_reset_need_not_wait_for_the_input_buffer(controller: I8042) -> None:
    controller.write(COMMAND, 0x20)
    assert not controller.read(STATUS) & IBF


def test_port_b_holds_its_controls_and_its_clock_ticks(controller: I8042) -> None:
    controller.write(PORT_B, 0xFD)
    first, second = controller.read(PORT_B), controller.read(PORT_B)
    assert first & 0x0F == second & 0x0F == 0x0D
    assert first ^ second == 0x10
    assert first & 0x20, "a loop that waits for timer 2 ends"
    assert not first & 0xC0, "no parity or channel check"


def test_ports_between_do_not_exist(controller: I8042) -> None:
    controller.write(2, 0xFE)
    assert (controller.read(2), controller.read(3)) == (0xFF, 0xFF)


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 255)), max_size=30), st.integers(0, 30))
def test_a_restored_controller_answers_alike(accesses: list[tuple[int, int | None]], cut: int) -> None:
    resets = [0, 0]

    def count(which: int) -> None:
        resets[which] += 1

    first = I8042(lambda: count(0))
    second = first
    for step, (offset, value) in enumerate(accesses):
        if step == cut:
            resets[1] = resets[0]
            second = I8042.from_state(first.state(), lambda: count(1))
        for controller in {id(first): first, id(second): second}.values():
            if value is not None:
                controller.write(offset, value)
            else:
                assert 0 <= controller.read(offset) <= 255
        assert first.state() == second.state()
    assert second is first or resets[0] == resets[1]


@pytest.mark.parametrize("wrong", [{"port_b": 0x20}, {"port_b": -1}, {"output_port_next": 1}])
def test_a_state_no_controller_can_have_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        I8042State(**wrong)  # type: ignore[arg-type]


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_accesses_are_counted_and_those_of_no_port_apart(controller: I8042) -> None:
    for offset in range(5):
        controller.read(offset)
        controller.write(offset, 0x20)
    assert (controller.read_count, controller.missed_read_count) == (3, 2)
    assert (controller.write_count, controller.missed_write_count) == (3, 2)
    assert controller.reset_count == 0


def test_resets_are_counted_however_they_are_asked_for(controller: I8042, resets: list[None]) -> None:
    controller.write(COMMAND, 0xFE)
    controller.write(COMMAND, 0xD1)
    controller.write(DATA, 0x00)
    assert controller.reset_count == len(resets) == 2
