"""``scripts/bench`` as it is run: what it prints, not how fast anything is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.bench import KEYS, bench


@pytest.mark.requires("kvm", "gcc")
def test_each_line_is_a_figure_beside_its_peer() -> None:
    done = bench("--quick", "import_time", "out_exit")
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


@pytest.mark.requires("kvm", "gcc")
def test_telemetry_is_clocked_and_counted() -> None:
    done = bench("--quick", "telemetry_cost")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    clocked, counted = (record for record in records if record["conditions"]["guest"] == "toy guest on KVM")
    assert (clocked["unit"], clocked["order"]) == ("ms", "A B A B")
    assert counted["unit"] == "%"
    assert counted["detail"]["events"] > 20


@pytest.mark.requires("kvm", "gcc")
def test_kicks_and_interrupts_are_timed_beside_a_thread_in_c() -> None:
    done = bench("--quick", "kick_to_loop", "virtqueue_request")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["name"] for record in records} == {"kick_to_loop", "loop_to_interrupt", "virtqueue_request"}
    assert all(record.keys() == KEYS and record["peer"] > 0 for record in records)
    assert all(record["ours_spread"]["p99"] >= record["ours"] > 0 for record in records)


def _records(*names: str) -> list[dict[str, Any]]:
    done = bench("--quick", *names)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(record.keys() == KEYS and record["ours"] is not None for record in records), done.stderr
    return records


@pytest.mark.requires("kvm", "gcc")
def test_a_restore_is_timed_on_each_level_beside_c() -> None:
    records = _records("restore_to_first_exit")
    restored = [record for record in records if record["name"] == "restore_to_first_exit"]
    filled = [record for record in records if record["name"] == "shell_to_first_exit"]
    ours = {record["conditions"]["ours"] for record in restored}
    assert ours == {"VM.restore", "KvmMachine.restore", "chain", "handed C"}
    assert len(filled) == 3
    assert all(record["peer"] > 0 and record["ours_spread"]["p99"] > 0 for record in records)
    assert {record["target"] for record in records} == {"ratio<=1.15", "ours<=1", None}


@pytest.mark.requires("kvm", "gcc")
def test_prefetching_spares_faults_before_the_guests_first_word() -> None:
    timed, counted = _records("restore_first_guest_event")
    assert timed["detail"]["not"]["minor_faults"] == counted["peer"]
    assert counted["ours"] < counted["peer"]


@pytest.mark.requires("kvm", "gcc")
def test_the_curve_of_clones_has_a_point_for_each_number_of_vms() -> None:
    records = _records("clones_curve")
    points = {(record["name"], record["conditions"].get("live")) for record in records}
    assert points >= {(name, live) for name in ("clones_restore", "clones_fault", "clones_memory") for live in (1, 5)}
    assert ("clones_per_second", None) in points
    memory = [record for record in records if record["name"] == "clones_memory"]
    assert all(record["detail"]["guest_kib"] > 0 for record in memory)


@pytest.mark.requires("kvm", "gcc")
def test_saves_and_their_pauses_are_timed_beside_what_they_cannot_do_without() -> None:
    records = {record["name"]: record for record in _records("snapshot_save", "snapshot_pause", "trigger_to_paused")}
    assert records.keys() == {"snapshot_save", "snapshot_extra_bytes", "snapshot_pause", "trigger_to_paused"}
    assert records["snapshot_save"]["detail"]["written_kib"] >= 32 << 10
    assert records["snapshot_extra_bytes"]["met"]
    assert records["trigger_to_paused"]["conditions"]["vcpus"] == 2


@pytest.mark.requires("kvm", "gcc", "qemu")
def test_peers_that_cannot_be_had_are_named_with_the_reason() -> None:
    records = _records("restore_first_output")
    assert len(records) == 4
    for record in records:
        assert record["peer"] is not None or "not measured: " in record["peer_name"]
    assert any("QEMU microvm" in record["peer_name"] and record["peer"] > 0 for record in records)
