from __future__ import annotations

import pytest

from asyncvmm.bus import Bus
from asyncvmm.errors import ConfigError
from asyncvmm.machine.kvm.port_watches import PortWatches, PortWritten


class Watched:
    """A bus, those who watch it, and what is on its way to the loop."""

    def __init__(self) -> None:
        self.bus = Bus()
        self.posted: list[PortWritten] = []
        self.watches = PortWatches(self.posted.append)

    def hand_out(self) -> None:
        while self.posted:
            self.watches.hand(self.posted.pop(0))


def test_a_watch_is_told_once_of_the_value_it_waits_for() -> None:
    watched, any_value, five = Watched(), list[int](), list[int]()
    watched.watches.add(watched.bus, 0x7B, None, any_value.append)
    watched.watches.add(watched.bus, 0x7B, 5, five.append)
    for value in (3, 4, 5, 5, 6):
        watched.bus.write(0x7B, value, 1)
    assert len(watched.posted) == 2
    watched.hand_out()
    assert (any_value, five) == ([3], [5])


def test_a_wide_access_is_its_bytes() -> None:
    watched, told = Watched(), list[int]()
    watched.watches.add(watched.bus, 0x7B, None, told.append)
    watched.bus.write(0x7A, 0x1122, 2)
    watched.hand_out()
    assert told == [0x11]


def test_one_that_has_ended_is_told_nothing_not_even_what_is_on_its_way() -> None:
    watched, told, other = Watched(), list[int](), list[int]()
    end = watched.watches.add(watched.bus, 0x7B, None, told.append)
    end_other = watched.watches.add(watched.bus, 0x7B, 9, other.append)
    watched.bus.write(0x7B, 1, 1)
    end()
    watched.hand_out()
    watched.bus.write(0x7B, 9, 1)
    watched.hand_out()
    assert (told, other) == ([], [9])
    end_other()
    watched.bus.write(0x7B, 9, 1)
    assert watched.posted == []


def test_a_refused_port_leaves_nothing() -> None:
    watched = Watched()
    with pytest.raises(ConfigError):
        watched.watches.add(watched.bus, 1 << 16, None, print)
    watched.watches.add(watched.bus, 0, None, print)()
