from __future__ import annotations

import re
from asyncio import CancelledError
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import attrs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from asyncvmm.effects import ExitCount, ExitStatistics
from asyncvmm.errors import (
    BootError,
    GuestStopped,
    KernelError,
    KvmIoctlError,
    SnapshotFailed,
    StateError,
    TriggerImpossible,
)
from asyncvmm.events import snapshot_types, types
from asyncvmm.events.encoding import timestamp, to_line
from asyncvmm.events.lines import Line
from asyncvmm.events.schema import schema, schema_text
from asyncvmm.events.types import EVENTS, Event
from asyncvmm.metrics.counters import kinds
from asyncvmm.metrics.groups import GROUPS
from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.profiles import (
    CreateVmProfile,
    GuestBootProfile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
)
from asyncvmm.timing.timeline import Phase
from asyncvmm.timing.vm_timing import VmTiming

EPOCH_NS = 1_763_692_533_123_456_789
VALIDATOR = Draft202012Validator(schema())

BOOT_ERROR = BootError(
    "the guest panicked",
    reason="panic",
    last_exit="IO",
    rip=0xFFFFFFFF81000000,
    exits=ExitStatistics({"IO": ExitCount(3, 300, 200)}, {}),
    phases={"memory": 12},
    serial_tail=b"Kernel panic \xff",
    expected="READY",
    found="a panic",
    state="booting",
)

BOOT = BootProfile(t_total_start=1, t_total_end=9, guest=GuestBootProfile(init_entry_ns=7))

METRICS: dict[str, dict[str, int | dict[str, int]]] = {
    "block": {"read_count": 3, "read_agg": {"min_us": 1, "max_us": 7, "sum_us": 12}},
    "block_root": {"read_count": 3, "read_agg": {"min_us": 1, "max_us": 7, "sum_us": 12}},
    "uart": {"write_count": 80},
}

SAMPLES: list[Event] = [
    types.VmState(1, "booting", "new"),
    types.VmState(0, "new"),
    types.VmState(9, "stopped", "ready", {"IO": 3}),
    types.VmState(0, "starting", "new", accel="kvm", snapshot="5eed", clone=0),
    types.AccelProbe(2, "qemu", "auto", "slow", "3.1 MIPS is below 20", True, True, 12, 3.1, 45.5, "7.2.9"),
    types.AccelProbe(2, "kvm"),
    types.PhaseEnded.of(Phase("memory", 105, 125, "setup", True), 100, attempt=1),
    types.PhaseEnded.of(Phase("setup", 105, 125, residual_ns=0), 100),
    types.GuestBootTime(3, "ready", (1 << 64) - 1),
    types.GuestReady(4),
    types.GuestPreExec(5),
    types.GuestHeartbeat(6, 1),
    types.GuestListener(7, "tcp", 8080),
    types.GuestExit(8, 137),
    types.GuestGoDone(8, 1_763_692_533_123_456_789, (1 << 64) - 1),
    types.GuestIdle(8),
    types.SerialLine.of(9, "console", Line(b"\xffhello", 9, True)),
    types.VmTimingEvent.of(10, VmTiming(setup_ms=1, boot_ms=2, boot_retries=0)),
    types.BootProfileEvent(10, BOOT, GuestClock(5, 2, "paired")),
    types.BootProfileEvent(10, BOOT),
    types.CreateVmProfileEvent(10, CreateVmProfile(kvm_fd_open=3, create_vm_total=9)),
    types.VcpuSetupProfileEvent(10, VcpuSetupProfile(cpuid_config=3, register_config=9)),
    types.RestoreProfileEvent(10, RestoreProfile(kvm_fd_open=3, resume_kvm_run=1)),
    types.RuntimeRestoreProfileEvent(10, RuntimeRestoreProfile(vcpu_state_restore=3)),
    snapshot_types.SnapshotTrigger(10, "pre_exec", "workload-pre-exec", 10),
    snapshot_types.SnapshotSaved(99, "c0ffee", "/var/s", "after", 10, 21, 98, 70, 88, 1 << 28, 1 << 25, False),
    snapshot_types.SnapshotFailedEvent.of(99, SnapshotFailed("snapshot", expected=Path("/s")), "after", "/s"),
    snapshot_types.SnapshotFailedEvent.of(99, StateError("snapshot", expected="a", found=1, state="new"), None, None),
    snapshot_types.SnapshotFailedEvent.of(99, CancelledError(), None, None),
    snapshot_types.SnapshotFailedEvent.of(99, CancelledError("scope 7f"), None, None, "the VM was stopped"),
    snapshot_types.RestoreMapped(5, 5, "c0ffee"),
    snapshot_types.RestoreFirstExit(7, 6),
    snapshot_types.RestoreFirstGuestEvent(9, 8, "guest.heartbeat", 120, 0),
    snapshot_types.RestoreFirstGuestEvent(9, 8, "serial"),
    snapshot_types.RestoreStep(9, "entropy", 4),
    types.Metrics(11, 1_763_692_533_123, METRICS),
    types.VmError.of(11, BOOT_ERROR),
    types.VmError.of(12, KernelError("the kernel", expected=4096, found=12)),
    types.VmError.of(13, KvmIoctlError("KVM_RUN", 14, "Bad address")),
    types.LogLost(14, 3),
]


def parsed(event: Event) -> dict[str, object]:
    line = to_line(event, "a1b2", EPOCH_NS)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    record = orjson.loads(line)
    assert isinstance(record, dict)
    return record


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.event)
def test_every_line_keeps_to_the_schema(event: Event) -> None:
    record = parsed(event)
    VALIDATOR.validate(record)
    assert list(record)[:5] == ["v", "ts", "t_ns", "vm", "event"]
    assert None not in record.values()


def test_events_that_say_the_same_are_the_same() -> None:
    assert types.GuestHeartbeat(6, 1) == types.GuestHeartbeat(6, 1) != types.GuestHeartbeat(6, 2)
    assert len({types.GuestHeartbeat(6, 1), types.GuestHeartbeat(6, 1)}) == 1
    assert len({types.GuestReady(4), types.GuestPreExec(4)}) == 2


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.event)
def test_the_line_says_the_details_in_their_order(event: Event) -> None:
    record = parsed(event)
    assert list(record)[5:] == list(event.details())
    if not isinstance(event, types.ProfileEvent | types.Metrics):
        names = [field.name for field in attrs.fields(type(event)) if getattr(event, field.name) is not None]
        assert list(record)[5:] == [name for name in names if name != "t_ns"]


def test_every_kind_of_event_has_a_sample_here() -> None:
    assert {event.event for event in SAMPLES} == set(EVENTS)


def test_the_schema_is_one_and_names_the_fields_of_every_class() -> None:
    Draft202012Validator.check_schema(schema())
    definitions = schema()["$defs"]
    assert set(definitions) == set(EVENTS) == set(schema()["properties"]["event"]["enum"])
    for name, kind in EVENTS.items():
        if issubclass(kind, types.ProfileEvent | types.Metrics):
            continue
        fields = {field.name for field in attrs.fields(kind)} - {"t_ns"}
        assert set(definitions[name]["properties"]) == fields, name
        required = {field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING} - {"t_ns"}
        assert required <= set(definitions[name]["required"]), name
    assert orjson.loads(schema_text()) == schema()


@pytest.mark.parametrize("kind", [kind for kind in EVENTS.values() if issubclass(kind, types.ProfileEvent)])
def test_the_schema_names_the_fields_and_totals_of_every_profile(kind: type[types.ProfileEvent]) -> None:
    record = getattr(types, kind.__annotations__["profile"])
    beside = {field.name for field in attrs.fields(kind)} - {"t_ns", "profile"}
    names = {field.name for field in attrs.fields(record)} | set(record().totals()) | beside | {"unit"}
    assert set(schema()["$defs"][kind.event]["properties"]) == names


def test_the_schema_names_the_groups_of_metrics_and_their_fields() -> None:
    described = dict(schema()["$defs"]["metrics"]["properties"])
    assert described.pop("utc_timestamp_ms")["type"] == "integer"
    assert {name: set(group["properties"]) for name, group in described.items()} == {
        name: set(kinds(group)) for name, group in GROUPS.items()
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"utc_timestamp_ms": "now"},
        {"uart": 3},
        {"uart": {"write_count": -1}},
        {"uart": {"write_count": 0.5}},
        {"net_eth0": {"tx_count": "many"}},
        {"block_root": {"read_agg": {"min_us": 1}}},
    ],
)
def test_the_schema_refuses_metrics_that_are_none(wrong: dict[str, object]) -> None:
    record = parsed(types.Metrics(3, 5, METRICS))
    VALIDATOR.validate({**record, "a_group_of_a_later_release": {"seen": True}})
    with pytest.raises(ValidationError):
        VALIDATOR.validate({**record, **wrong})


def test_the_schema_allows_more_fields_and_refuses_wrong_ones() -> None:
    record = parsed(types.GuestBootTime(3, "ready", 5))
    VALIDATOR.validate({**record, "new_in_a_later_release": 1})
    for wrong in ({"stage": "lunch"}, {"guest_ns": -1}, {"v": 2}, {"event": "guest.bot_time"}, {"ts": "yesterday"}):
        with pytest.raises(ValidationError):
            VALIDATOR.validate({**record, **wrong})


def test_the_design_example_comes_out_as_written() -> None:
    epoch_ns = int(datetime(2026, 11, 21, 2, 25, 33, tzinfo=UTC).timestamp()) * 10**9 + 123_456_789 - 184_250_331
    assert to_line(types.GuestBootTime(184_250_331, "mounts_done", 31_250_110), "a1b2", epoch_ns) == (
        b'{"v":1,"ts":"2026-11-21T02:25:33.123456Z","t_ns":184250331,"vm":"a1b2","event":"guest.boot_time",'
        b'"stage":"mounts_done","guest_ns":31250110}\n'
    )


@given(st.integers(0, 4 * 10**18))
def test_a_timestamp_is_the_wall_clock_cut_to_microseconds(wall_ns: int) -> None:
    text = timestamp(wall_ns)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    moment = datetime.fromisoformat(text)
    assert int(moment.timestamp()) == wall_ns // 10**9
    assert moment.microsecond == wall_ns % 10**9 // 1000


@given(st.text(st.characters(), max_size=50) | st.just("/boot/\udcff"), st.binary(max_size=50))
def test_no_text_keeps_a_line_from_coming(text: str, raw: bytes) -> None:
    error = BootError(text, reason="panic", serial_tail=raw, found=text)
    VALIDATOR.validate(parsed(types.VmError.of(1, error)))


def test_a_phase_counts_from_the_start_of_its_vm() -> None:
    event = types.PhaseEnded.of(Phase("memory", 105, 125), 100)
    assert (event.start_ns, event.duration_ns, event.t_ns) == (5, 20, 25)


def test_the_schema_knows_the_triggers_that_there_are() -> None:
    for event in ("snapshot.trigger", "snapshot.saved", "snapshot.failed"):
        described = schema()["$defs"][event]["properties"]["trigger"]["enum"]
        assert tuple(described) == get_args(snapshot_types.Trigger)


def test_a_snapshot_that_failed_says_what_was_behind_it() -> None:
    cancelled = CancelledError("Cancelled via cancel scope 7f00")
    record = parsed(snapshot_types.SnapshotFailedEvent.of(9, cancelled, None, None, "the VM was stopped"))
    assert (record["kind"], record["what"], record["reason"]) == ("CancelledError", "snapshot", "the VM was stopped")
    impossible = TriggerImpossible("snapshot trigger", expected="a listener", found="the guest has ended")
    assert "reason" not in parsed(snapshot_types.SnapshotFailedEvent.of(9, impossible, None, None))
    impossible.__cause__ = GuestStopped("guest", expected="an orderly end", found="a panic", reason="panic")
    record = parsed(snapshot_types.SnapshotFailedEvent.of(9, impossible, None, None))
    assert (record["found"], record["reason"]) == (
        "the guest has ended",
        "guest: expected an orderly end, found a panic",
    )


def test_an_error_carries_its_evidence() -> None:
    record = parsed(types.VmError.of(11, BOOT_ERROR))
    assert record["kind"] == "BootError"
    assert record["rip"] == "0xffffffff81000000"
    assert record["exits"] == {"IO": 3}
    assert record["serial_tail"] == "Kernel panic \ufffd"
