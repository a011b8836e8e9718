"""``scripts/bench`` as it is run, where it needs no VM: what it prints, not how fast anything is."""

from __future__ import annotations

import json

from tests.support.bench import KEYS, bench


def test_what_events_cost_is_measured_without_a_vm() -> None:
    done = bench("--quick", "event_cost", "event_stream")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(record.keys() == KEYS and record["ours"] > 0 for record in records)
    cases = {record["conditions"]["case"] for record in records}
    assert {"event nobody hears", "phase of the timeline", "one event", "as fast as it goes"} <= cases
    assert [record["name"] for record in records] == ["event_cost"] * 4 + ["event_stream"] * 3


def test_the_list_names_every_figure() -> None:
    done = bench("--list")
    assert done.returncode == 0
    assert "create_to_first_exit" in done.stdout
    assert "linux_exits_to_ready" in done.stdout
    assert "linux_disk" in done.stdout


def test_an_unknown_figure_is_refused() -> None:
    done = bench("no_such_figure")
    assert done.returncode == 2
    assert "no figure named no_such_figure" in done.stderr
    assert not done.stdout
