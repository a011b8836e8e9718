"""What records add to metrics: boots, failures, phases, exits; bounded, whoever wrote the records."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncvmm
from asyncvmm.errors import BootError, GuestStopped, HostError
from asyncvmm.events.markers import STAGES
from asyncvmm.events.types import VmError
from asyncvmm.export.facts import MAX_STRANGERS, Count, Duration, Fact, Fold, VmFacts, Vocabulary, Words
from asyncvmm.export.records import NotARecord, Record, record_of


def line(vm: str, event: str, **fields: object) -> Record:
    return {"v": 1, "t_ns": 0, "vm": vm, "event": event, **fields}


def state(vm: str, previous: str, now: str, **fields: object) -> Record:
    return line(vm, "vm.state", previous=previous, state=now, **fields)


def all_of(*records: Record) -> list[Fact]:
    fold = Fold()
    return [fact for record in records for fact in fold.of(record)]


def counted(facts: list[Fact]) -> Counter[tuple[str, ...]]:
    sums: Counter[tuple[str, ...]] = Counter()
    for fact in facts:
        sums[(fact.metric, *fact.labels)] += fact.amount if isinstance(fact, Count) else 1
    return sums


# -- boots and failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (("booting", "ready"), "ready"),
        (("booting", "failed"), "failed"),
        (("starting", "failed"), "failed"),
        (("booting", "stopped"), "cancelled"),
    ],
)
def test_a_boot_counts_once_by_its_end(end: tuple[str, str], outcome: str) -> None:
    facts = all_of(
        state("a", "new", "starting"),
        line("a", "accel.probe", accel="kvm"),
        state("a", "starting", "booting"),
        state("a", *end),
    )
    assert facts == [Count("boots", ("kvm", outcome))]


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_a_guest_that_is_ready_and_gone_at_once_has_booted(end: str) -> None:
    facts = all_of(line("a", "guest.ready"), state("a", "booting", end))
    assert facts == [Count("boots", ("unknown", "ready"))]


def test_resuming_and_stopping_a_guest_are_no_boots() -> None:
    assert not all_of(
        state("a", "paused", "ready"),
        state("a", "ready", "paused"),
        state("a", "ready", "stopped"),
        state("a", "new", "x"),
    )


def test_vms_mixed_in_one_file_keep_their_accelerators() -> None:
    facts = all_of(
        line("a", "accel.probe", accel="kvm"),
        line("b", "accel.probe", accel="qemu"),
        line("a", "phase", name="boot", duration_ns=1_000_000),
        line("b", "phase", name="boot", duration_ns=2_000_000),
        line("c", "phase", name="boot", duration_ns=3_000_000),
    )
    assert [fact.labels[:2] for fact in facts] == [("boot", "kvm"), ("boot", "qemu"), ("boot", "unknown")]
    assert [fact.seconds for fact in facts if isinstance(fact, Duration)] == pytest.approx([0.001, 0.002, 0.003])


def test_a_name_used_again_is_a_new_vm() -> None:
    facts = all_of(
        line("a", "accel.probe", accel="kvm"),
        state("a", "ready", "stopped", exits={"IO": 5}),
        state("a", "new", "starting"),
        line("a", "phase", name="accel", duration_ns=1),
        state("a", "ready", "stopped", exits={"IO": 3}),
    )
    assert counted(facts) == {("exits", "IO"): 8, ("phase_duration_seconds", "accel", "unknown", "boot"): 1}


@pytest.mark.parametrize(
    ("error", "labels"),
    [
        (BootError("boot", reason="panic", state="booting"), ("boot_failures", "unknown", "BootError", "panic")),
        (HostError("no host"), ("boot_failures", "unknown", "HostError", "none")),
        (
            GuestStopped("x", reason="triple-fault", state="ready"),
            ("vm_failures", "unknown", "GuestStopped", "triple-fault"),
        ),
    ],
)
def test_failures_count_by_kind_and_reason(error: HostError, labels: tuple[str, ...]) -> None:
    assert counted(VmFacts(Vocabulary()).of(record_of(VmError.of(5, error)))) == {labels: 1}


def test_a_failure_after_ready_is_none_of_the_boot() -> None:
    facts = all_of(
        state("a", "booting", "ready"), line("a", "vm.error", kind="GuestStopped", what="x", reason="machine")
    )
    assert counted(facts)["vm_failures", "unknown", "GuestStopped", "machine"] == 1


def test_a_phase_that_failed_is_counted_apart() -> None:
    facts = all_of(line("a", "phase", name="boot_wait", duration_ns=1, failed=True))
    assert facts == [Count("phase_failures", ("boot_wait", "unknown", "boot"))]


def test_retries_and_lost_lines_count() -> None:
    facts = all_of(
        line("a", "vm.timing", boot_retries=2),
        line("a", "vm.timing", boot_retries=0),
        line("a", "log.lost", lines=7),
    )
    assert facts == [Count("boot_retries", ("unknown",), 2), Count("events_lost", (), 7)]


# -- snapshots and restores --------------------------------------------------------------------------------------------


def made_of_a_snapshot(vm: str = "a", **fields: object) -> Record:
    return state(vm, "new", "starting", **{"accel": "kvm", "snapshot": "5eed", **fields})


SAVED = {"trigger": "listener", "pause_duration_ns": 2_000_000, "save_duration_ns": 30_000_000, "allocated_bytes": 4096}


def test_a_vm_made_of_a_snapshot_runs_on_the_machine_that_it_names_as_it_starts() -> None:
    facts = all_of(made_of_a_snapshot(), line("a", "phase", name="total", duration_ns=1))
    assert [fact.labels for fact in facts] == [("total", "kvm", "restore")]


def test_phases_of_boots_and_of_restores_are_told_apart_in_older_files_too() -> None:
    told = line("a", "phase", name="total", duration_ns=1)
    assert [fact.labels for fact in all_of(told)] == [("total", "unknown", "boot")]
    facts = all_of(line("a", "restore.mapped", duration_ns=1, snapshot="s"), told)
    assert [fact.labels for fact in facts[1:]] == [("total", "unknown", "restore")]


@pytest.mark.parametrize(
    ("end", "outcome"), [("paused", "restored"), ("ready", "restored"), ("failed", "failed"), ("stopped", "cancelled")]
)
def test_a_restore_counts_once_by_its_end_and_is_no_boot(end: str, outcome: str) -> None:
    facts = all_of(
        made_of_a_snapshot(), state("a", "starting", end), state("a", "paused", "ready"), state("a", "ready", "stopped")
    )
    assert facts == [Count("restores", ("kvm", outcome))]


def test_a_restored_guest_that_is_gone_at_once_was_restored() -> None:
    mapped = line("a", "restore.mapped", duration_ns=1, snapshot="5eed")
    facts = all_of(made_of_a_snapshot(), mapped, state("a", "starting", "stopped"))
    assert facts[1:] == [Count("restores", ("kvm", "restored"))]


@pytest.mark.parametrize("number", [0, 99])
def test_a_clone_is_a_restore_and_counts_as_a_clone_besides(number: int) -> None:
    facts = all_of(made_of_a_snapshot(clone=number), state("a", "starting", "paused"))
    assert facts == [Count("restores", ("kvm", "restored")), Count("clones", ("kvm", "restored"))]


def test_a_restore_that_fails_is_no_boot_that_failed() -> None:
    error = line("a", "vm.error", kind="SnapshotMismatch", what="cpu", state="starting")
    assert counted(all_of(made_of_a_snapshot(), error, state("a", "starting", "failed"))) == {
        ("restore_failures", "kvm", "SnapshotMismatch", "none"): 1,
        ("restores", "kvm", "failed"): 1,
    }
    later = all_of(
        made_of_a_snapshot(), state("a", "starting", "paused"), line("a", "vm.error", kind="GuestStopped", what="")
    )
    assert counted(later)["vm_failures", "kvm", "GuestStopped", "none"] == 1


def test_the_stages_of_a_restore_are_observed_from_its_call() -> None:
    facts = all_of(
        made_of_a_snapshot(),
        line("a", "restore.mapped", duration_ns=1_000_000, snapshot="s"),
        line("a", "restore.first_exit", duration_ns=2_000_000),
        line("a", "restore.first_guest_event", duration_ns=3_000_000, kind="serial"),
    )
    assert [(fact.metric, *fact.labels) for fact in facts] == [
        ("restore_stage_seconds", stage, "kvm") for stage in ("mapped", "first_exit", "first_guest_event")
    ]
    assert [fact.seconds for fact in facts if isinstance(fact, Duration)] == pytest.approx([0.001, 0.002, 0.003])


@pytest.mark.parametrize(("difference", "kind"), [(False, "full"), (True, "difference")])
def test_a_snapshot_counts_by_its_trigger_with_its_pause_its_duration_and_its_bytes(
    difference: bool, kind: str
) -> None:
    facts = all_of(line("a", "accel.probe", accel="qemu"), line("a", "snapshot.saved", difference=difference, **SAVED))
    assert facts == [
        Count("snapshots", ("qemu", "saved", "listener")),
        Count("snapshot_bytes", ("qemu", kind), 4096),
        Duration("snapshot_pause_seconds", ("qemu", kind), 2_000_000 * 1e-9),
        Duration("snapshot_save_seconds", ("qemu", kind), 30_000_000 * 1e-9),
    ]


def test_a_snapshot_that_failed_counts_by_its_error_and_one_cancelled_is_no_failure() -> None:
    failed = line("a", "snapshot.failed", kind="SnapshotFailed", what="x", trigger="after")
    assert counted(all_of(failed, line("a", "snapshot.failed", kind="CancelledError", what="snapshot"))) == {
        ("snapshots", "unknown", "failed", "after"): 1,
        ("snapshot_failures", "unknown", "SnapshotFailed"): 1,
        ("snapshots", "unknown", "cancelled", "none"): 1,
    }


def test_triggers_and_errors_of_snapshots_are_a_closed_list() -> None:
    facts = all_of(
        line("a", "snapshot.saved", difference=False, **{**SAVED, "trigger": "evil"}),
        line("a", "snapshot.failed", kind="Evil", what="x", trigger="worse"),
    )
    assert [fact.labels for fact in facts if fact.metric.startswith("snapshot")] == [
        ("unknown", "saved", "other"),
        *[("unknown", "full")] * 3,
        ("unknown", "failed", "other"),
        ("unknown", "other"),
    ]


def reached(name: str, seconds: int, vm: str = "a") -> Record:
    return line(vm, "guest.boot_time", stage=name, guest_ns=seconds * 1_000_000_000)


def stages(facts: list[Fact]) -> list[tuple[str, float]]:
    return [(fact.labels[0], round(fact.seconds, 9)) for fact in facts if isinstance(fact, Duration)]


@pytest.mark.parametrize("end", ["ready", "failed", "stopped"])
def test_a_stage_counts_once_with_its_last_value_when_the_boot_is_over(end: str) -> None:
    facts = all_of(*(reached("ready", n) for n in range(1, 1001)), reached("init_ok", 3), state("a", "booting", end))
    assert stages(facts) == [("ready", 1000.0), ("init_ok", 3.0)]


def test_the_stage_after_ready_counts_when_it_comes_and_others_at_the_vms_end() -> None:
    facts = all_of(state("a", "booting", "ready"), reached("command_loop", 1), reached("command_loop", 2))
    assert stages(facts) == [("command_loop", 1.0)]
    late = [state("a", "booting", "ready"), reached("init_ok", 1), reached("init_ok", 2)]
    assert stages(all_of(*late)) == []
    assert stages(all_of(*late, state("a", "ready", "stopped"), reached("init_ok", 3))) == [("init_ok", 2.0)]


def test_a_stage_that_is_said_again_after_the_boot_does_not_count_again() -> None:
    again = [reached("ready", 2), reached("command_loop", 3), reached("ready", 4), state("a", "ready", "stopped")]
    facts = all_of(reached("ready", 1), state("a", "booting", "ready"), *again)
    assert stages(facts) == [("ready", 1.0), ("command_loop", 3.0)]


def test_stages_of_a_vm_that_is_forgotten_or_whose_name_is_used_again_count() -> None:
    fold = Fold(max_vms=1)
    assert fold.of(reached("ready", 1)) == []
    with pytest.raises(NotARecord):
        fold.of(state("a", "new", "starting", exits=7))
    assert stages(fold.of(state("a", "new", "starting"))) == [("ready", 1.0)]
    assert fold.of(reached("ready", 2)) == []
    assert stages(fold.of(reached("init_ok", 3, "b"))) == [("ready", 2.0)]


@given(st.lists(st.text(max_size=40) | st.sampled_from(["ready", "command_loop"]), max_size=60))
def test_a_vm_holds_few_stages_however_many_are_told(names: list[str]) -> None:
    facts = all_of(*(reached(name, 1) for name in names), state("a", "booting", "stopped"))
    counts = counted([fact for fact in facts if isinstance(fact, Duration)])
    assert set(counts.values()) <= {1}
    assert {key[1] for key in counts} <= {*STAGES, "other"}


def test_exits_told_twice_count_once() -> None:
    facts = all_of(
        line("a", "vm.error", kind="BootError", what="boot", exits={"IO": 10, "HLT": 1}),
        state("a", "booting", "failed", exits={"IO": 12, "HLT": 1}),
    )
    sums = counted(facts)
    assert (sums["exits", "IO"], sums["exits", "HLT"]) == (12, 1)


# -- what others wrote -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        line("a", "phase", name="boot", duration_ns=-1),
        line("a", "phase", name="boot", duration_ns="1"),
        line("a", "phase", name="boot", duration_ns=True),
        line("a", "phase", name="boot", duration_ns=float("nan")),
        line("a", "phase", name="boot", duration_ns=1 << 70),
        line("a", "phase", name=None, duration_ns=1),
        line("a", "phase"),
        line("a", "vm.state"),
        line("a", "vm.state", state="stopped", previous="ready", exits={"IO": -1}),
        line("a", "vm.error", kind=7, what="x"),
        line("a", "vm.error", kind="BootError", reason=[]),
        line("a", "guest.boot_time", stage="ready", guest_ns=None),
        line("a", "log.lost", lines="many"),
        line("a", "vm.timing", boot_retries=-1),
        line("a", "accel.probe", accel=1),
        state("a", "new", "starting", snapshot=7),
        state("a", "new", "starting", snapshot="s", accel=7),
        state("a", "new", "starting", snapshot="s", clone="first"),
        line("a", "restore.mapped", duration_ns=-1),
        line("a", "restore.first_exit"),
        line("a", "snapshot.saved"),
        line("a", "snapshot.saved", difference=True, **{**SAVED, "trigger": 7}),
        line("a", "snapshot.saved", difference=True, **{**SAVED, "pause_duration_ns": -1}),
        line("a", "snapshot.saved", difference=True, **{**SAVED, "allocated_bytes": 1 << 80}),
        line("a", "snapshot.failed", kind=None),
        line("a", "snapshot.failed", kind="SnapshotFailed", trigger=[]),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_and_counts_nothing(record: Record) -> None:
    fold = Fold()
    with pytest.raises(NotARecord):
        fold.of(record)


@given(st.lists(st.text(max_size=80), max_size=300))
def test_label_values_are_few_whatever_the_names(names: list[str]) -> None:
    words = Words(["boot"])
    said = {words(name) for name in names}
    assert len(said - {"other", "boot"}) <= MAX_STRANGERS
    assert words("boot") == "boot"
    assert all(len(word) <= 64 and word.isprintable() and word.isascii() for word in said)


def test_the_first_strangers_are_let_through_and_the_rest_is_other() -> None:
    words = Words([], 2)
    assert [words(name) for name in ("a", "b", "c", "a", "x\ny", "")] == ["a", "b", "other", "a", "other", "other"]


def test_names_of_errors_and_accelerators_are_a_closed_list() -> None:
    facts = all_of(line("a", "accel.probe", accel="hvf"), line("a", "vm.error", kind="Evil", what="x", reason="none"))
    assert [fact.labels for fact in facts] == [("other", "other", "none")]


def test_vms_are_forgotten_beyond_a_number() -> None:
    fold = Fold(max_vms=2)
    for name in "abc":
        fold.of(line(name, "accel.probe", accel="kvm"))
    [forgotten] = fold.of(line("a", "phase", name="boot", duration_ns=1))
    [known] = fold.of(line("c", "phase", name="boot", duration_ns=1))
    assert (forgotten.labels, known.labels) == (("boot", "unknown", "boot"), ("boot", "kvm", "boot"))


def test_a_vm_holds_few_exit_reasons_however_many_are_told() -> None:
    sums = counted(all_of(state("a", "ready", "stopped", exits={f"reason {number}": 2 for number in range(1000)})))
    assert len(sums) == MAX_STRANGERS + 1
    assert sums.total() == 2000
    assert sums["exits", "other"] == 2 * (1000 - MAX_STRANGERS)


def test_every_phase_of_asyncvmm_is_a_known_word() -> None:
    """Strangers in a file take the place of other strangers, never that of ours."""
    words = Words(Vocabulary().phase._known, 0)
    for path in Path(asyncvmm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "phase":
                for name in node.args:
                    if isinstance(name, ast.Constant):
                        assert words(str(name.value)) == name.value, path
