from __future__ import annotations

import pytest

from asyncvmm.machine.kvm.guest_tsc import common_offset
from asyncvmm.timing.tsc import TscOffset


@pytest.mark.parametrize(
    ("offsets", "common"),
    [
        ([TscOffset(-5, -5)], TscOffset(-5, -5)),
        ([TscOffset(-5, -5), TscOffset(-5, -5)], TscOffset(-5, -5)),
        ([TscOffset(-9, -4), TscOffset(-6, -2)], TscOffset(-6, -4)),
        ([TscOffset(-9, -7), TscOffset(-6, -2)], None),
        ([TscOffset(-5, -5), None], None),
        ([], None),
    ],
    ids=["one vCPU", "two alike", "two not known exactly", "two that differ", "one not known", "no vCPU"],
)
def test_the_offset_of_a_guest_is_what_is_true_of_all_its_vcpus(
    offsets: list[TscOffset | None], common: TscOffset | None
) -> None:
    assert common_offset(offsets) == common
