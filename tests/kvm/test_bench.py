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


def test_what_events_cost_is_measured_without_a_vm() -> None:
    done = _bench("--quick", "event_cost", "event_stream")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(record.keys() == KEYS and record["ours"] > 0 for record in records)
    cases = {record["conditions"]["case"] for record in records}
    assert {"event nobody hears", "phase of the timeline", "one event", "as fast as it goes"} <= cases
    assert [record["name"] for record in records] == ["event_cost"] * 4 + ["event_stream"] * 3


@pytest.mark.requires("kvm", "gcc")
def test_telemetry_is_clocked_and_counted() -> None:
    done = _bench("--quick", "telemetry_cost")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    clocked, counted = (record for record in records if record["conditions"]["guest"] == "toy guest on KVM")
    assert (clocked["unit"], clocked["order"]) == ("ms", "A B A B")
    assert counted["unit"] == "%"
    assert counted["detail"]["events"] > 20


@pytest.mark.requires("kvm", "gcc")
def test_kicks_and_interrupts_are_timed_beside_a_thread_in_c() -> None:
    done = _bench("--quick", "kick_to_loop", "virtqueue_request")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["name"] for record in records} == {"kick_to_loop", "loop_to_interrupt", "virtqueue_request"}
    assert all(record.keys() == KEYS and record["peer"] > 0 for record in records)
    assert all(record["ours_spread"]["p99"] >= record["ours"] > 0 for record in records)


def test_the_list_names_every_figure() -> None:
    done = _bench("--list")
    assert done.returncode == 0
    assert "create_to_first_exit" in done.stdout
    assert "linux_exits_to_ready" in done.stdout
    assert "linux_disk" in done.stdout


def test_an_unknown_figure_is_refused() -> None:
    done = _bench("no_such_figure")
    assert done.returncode == 2
    assert "no figure named no_such_figure" in done.stderr
    assert not done.stdout
