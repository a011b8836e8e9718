"""Durations in the unit they fill, and foreign text made harmless."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.text import duration_text, printable, share_text


@pytest.mark.parametrize(
    ("ns", "said"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1.00 us"),
        (75_399, "75.3 us"),
        (999_999, "999 us"),
        (1_000_000, "1.00 ms"),
        (30_351_362, "30.3 ms"),
        (2_251_029_018, "2251 ms"),
        (-1_240_000, "-1.24 ms"),
        (1 << 64, "18446744073709 ms"),
    ],
)
def test_a_duration_is_in_the_largest_unit_in_which_it_is_not_0(ns: int, said: str) -> None:
    assert duration_text(ns) == said


@given(st.integers(-(1 << 64), 1 << 64))
def test_a_duration_is_never_told_longer_than_it_was_nor_much_shorter(ns: int) -> None:
    number, unit = duration_text(ns).split()
    told = abs(float(number)) * {"ms": 1e6, "us": 1e3, "ns": 1}[unit]
    assert told <= abs(ns) * (1 + 1e-9)
    assert told >= abs(ns) * 0.99


@pytest.mark.parametrize(("part", "whole", "said"), [(0, 0, "0.0%"), (5, 0, "0.0%"), (1, 3, "33.3%"), (2, 1, "200.0%")])
def test_a_share_has_one_decimal_and_none_of_nothing_is_none(part: int, whole: int, said: str) -> None:
    assert share_text(part, whole) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain [bold]text[/] é 漢", "plain [bold]text[/] é 漢"),
        ("\x1b[2J\r\n\0", "\\x1b[2J\\x0d\\x0a\\x00"),
        ("a\u202eb\u2028\ufeff", "a\\u202eb\\u2028\\ufeff"),
        ("\ud800\U000e0001", "\\ud800\\U000e0001"),
        ("xxxxxx", "xxxxx…"),
    ],
)
def test_what_could_mislead_is_escaped(text: str, said: str) -> None:
    assert printable(text, 5 if text.startswith("xxx") else 256) == said


@given(st.text(st.characters(), max_size=400))
def test_whatever_the_text_it_is_printable_and_short(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert len(shown) <= 256 * 10 + 1
