"""``scripts/bench`` as it is run: what it prints, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
KEYS = {
    *("name", "unit", "conditions", "ours", "peer_name", "peer", "ratio", "difference", "target", "met", "n", "order"),
    *("ours_spread", "peer_spread", "detail", "run"),
}


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BENCH, *arguments], capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.requires("kvm")
@pytest.mark.requires("gcc")
def test_each_line_is_a_figure_beside_its_peer() -> None:
    done = _bench("--quick", "import_time", "out_exit")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["name"] for record in records} == {"import_time", "out_exit"}
    for record in records:
        assert record.keys() == KEYS
        assert record["n"] > 0
        assert record["ours"] > 0
        assert record["peer"] > 0
        assert record["order"] == "A B A B"
        assert isinstance(record["met"], bool)
    loads = {record["conditions"]["python_thread"] for record in records if record["name"] == "out_exit"}
    assert loads == {"idle", "busy"}


def test_the_list_names_every_figure() -> None:
    done = _bench("--list")
    assert done.returncode == 0
    assert "create_to_first_exit" in done.stdout
    assert "linux_exits_to_ready" in done.stdout


def test_an_unknown_figure_is_refused() -> None:
    done = _bench("no_such_figure")
    assert done.returncode == 2
    assert "no figure named no_such_figure" in done.stderr
    assert not done.stdout
