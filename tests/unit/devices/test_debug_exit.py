from __future__ import annotations

from asyncvmm.devices.debug_exit import DebugExit


def test_a_byte_written_is_the_exit_value() -> None:
    values: list[int] = []
    port = DebugExit(values.append)
    assert port.read(0) == 0xFF
    port.write(0, 0x2A)
    assert values == [0x2A]


def test_a_restored_port_exits_as_well() -> None:
    values: list[int] = []
    DebugExit.from_state(DebugExit(values.append).state(), values.append).write(0, 1)
    assert values == [1]
