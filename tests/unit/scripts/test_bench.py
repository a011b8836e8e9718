"""The bench's pure parts: what becomes of samples."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

PARTS = Path(__file__).parents[3] / "scripts" / "_bench"


def _load(name: str) -> ModuleType:
    """A module of the bench, which is no package's part."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", PARTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


figure = _load("figure")
turns = _load("turns")


def test_a_figure_compares_medians_not_means() -> None:
    record = figure.Figure(name="f", unit="us", ours=[2, 3, 1000], peer=[1, 2, 5000], peer_name="floor").record()
    assert (record["ours"], record["peer"], record["ratio"], record["difference"]) == (3, 2, 1.5, 1)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (("ratio", "<=", 1.10), False),
        (("ratio", "<=", 1.5), True),
        (("ratio", ">=", 0.9), True),
        (("ours", "<=", 20), True),
        (("difference", "<=", 0.5), False),
    ],
)
def test_a_target_is_held_to_its_own_subject(target: tuple[str, str, float], met: bool) -> None:
    record = figure.Figure(name="f", unit="us", ours=[3], peer=[2], target=figure.Target(*target)).record()
    assert record["met"] is met
    assert record["target"] == f"{target[0]}{target[1]}{target[2]:g}"


def test_a_ratio_to_no_peer_is_neither_met_nor_missed() -> None:
    record = figure.Figure(name="f", unit="us", ours=[3], target=figure.Target("ratio", "<=", 1)).record()
    assert record["ratio"] is None
    assert record["met"] is None
    assert record["order"] == "A"


def test_a_peer_of_zero_gives_no_ratio() -> None:
    assert figure.compare([1.0], [0.0])["ratio"] is None


@given(st.lists(st.floats(0.001, 1e9), min_size=1, max_size=200))
def test_a_spread_is_in_order(samples: list[float]) -> None:
    values = list(figure.spread(samples).values())
    assert values == sorted(values)
    assert json.loads(json.dumps(values)) == values


def test_sides_take_turns_and_the_warm_up_is_forgotten() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = turns.take_turns(lambda: side("A"), lambda: side("B"), rounds=2, warm_up=1)
    assert order == ["A", "B"] * 3
    assert (taken.ours, taken.peer) == ([3, 5], [4, 6])
