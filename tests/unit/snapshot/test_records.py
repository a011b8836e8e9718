"""What a snapshot keeps of a VM beside its machine: configuration, guest, working set, order."""

from __future__ import annotations

import os
from contextlib import suppress
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm import BalloonConfig, ConfigError, ConsoleConfig, DriveConfig, NetConfig, Publish, VMConfig, VsockConfig
from asyncvmm.console import Console
from asyncvmm.errors import SnapshotDamaged
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.hub import EventHub
from asyncvmm.events.lines import Line
from asyncvmm.events.types import GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.config_record import from_plain, to_plain
from asyncvmm.snapshot.guest_record import GuestRecord, record_of
from asyncvmm.snapshot.order import SnapshotOrder
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.working_set import FILE, WorkingSet, keep_working_set, read_working_set
from asyncvmm.timing.timeline import Timeline
from asyncvmm.watch import GuestWatch

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def through_json(value: object) -> Any:
    return orjson.loads(orjson.dumps(value))


# -- the configuration -------------------------------------------------------------------------------------------------


def test_a_configuration_with_everything_comes_back_as_it_was() -> None:
    config = VMConfig(
        memory_mib=512,
        kernel=Path("/kernel"),
        workload=("sh", "-c", "true"),
        env=("A=b",),
        drives=[DriveConfig(path=Path("/disk"), overlay=True), DriveConfig(path=Path("/other"), read_only=True)],
        net=NetConfig(address=IPv4Interface("10.0.2.15/24"), publish=(Publish(host_port=80, guest_port=8080),)),
        balloon=BalloonConfig(mib=64),
        vsock=VsockConfig(uds_path=Path("/run/v")),
        rng=True,
        virtio_console=ConsoleConfig(ports=("agent",)),
        pre_exec_window=True,
        track_dirty=True,
    )
    assert from_plain(through_json(to_plain(config))) == config


def test_the_default_configuration_comes_back_too() -> None:
    assert from_plain(through_json(to_plain(VMConfig()))) == VMConfig()


@given(plain_values)
def test_what_is_no_configuration_is_a_damaged_snapshot(value: object) -> None:
    try:
        from_plain(value)
    except SnapshotDamaged:
        pass
    else:
        assert isinstance(value, dict)


@given(st.sampled_from(sorted(to_plain(VMConfig()))), plain_values)
def test_a_field_with_another_value_is_a_configuration_or_damage(name: str, value: object) -> None:
    with suppress(SnapshotDamaged):
        from_plain({**through_json(to_plain(VMConfig())), name: value})


# -- the guest ---------------------------------------------------------------------------------------------------------


def test_a_guest_comes_back_with_what_it_has_said() -> None:
    hub = EventHub()
    for event in (GuestPreExec(3), GuestHeartbeat(4, 9), GuestListener(5, "tcp", 80), GuestIdle(6)):
        hub.publish(event)
    contract = GuestContract.of_saved(has_pid1=True, started=True, stages={"ready_ns": 5}, answers_go=True)
    watch = GuestWatch(hub, Console(write), Timeline(), lambda stopped: None)
    watch.go_on(contract, {"console": b"half a li\xff", "control": b""})
    record = record_of(watch, hub, holds_workload=True)
    assert GuestRecord.of_section(record.to_section()) == record
    assert (record.in_window, record.exited, record.console_line) == (True, False, b"half a li\xff")
    assert record.answers_go
    assert record.past() == [GuestPreExec(0), GuestListener(0, "tcp", 80), GuestHeartbeat(0, 9), GuestIdle(0)]


async def write(data: bytes) -> None:
    raise AssertionError(data)


@pytest.mark.parametrize(
    "fact",
    [{}, {"event": "guest.exit", "code": 1}, {"event": "guest.listener", "proto": 1, "port": 2}, {"event": []}, 5],
)
def test_a_fact_that_no_guest_can_have_come_to_is_damage(fact: Any) -> None:
    with pytest.raises(SnapshotDamaged):
        GuestRecord(facts=(fact,))


@given(plain_values)
def test_what_is_no_guest_is_a_damaged_snapshot(value: object) -> None:
    with pytest.raises(SnapshotDamaged):
        GuestRecord.of_section(orjson.dumps(value))


def test_a_restored_guest_cannot_be_ready_or_start_its_workload_again() -> None:
    contract = GuestContract.of_saved(has_pid1=True, started=True, stages={"ready_ns": 5})
    assert contract.line("control", Line(b"READY", 1)) is None
    assert contract.line("control", Line(b"workload-pre-exec", 1)) is None
    assert contract.line("console", Line(b"READY", 1)) is None
    assert contract.profile.ready_ns == 5
    assert contract.line("control", Line(b"heartbeat counter=3", 1)) is not None


# -- the working set ---------------------------------------------------------------------------------------------------

MEMORY = 1 << 24


def test_a_working_set_is_kept_once(tmp_path: Path) -> None:
    first = WorkingSet(((0, 4096), (8192, 8192)), ((8192, 4096),))
    keep_working_set(tmp_path, first)
    keep_working_set(tmp_path, WorkingSet(((0, 8192),), ()))
    assert read_working_set(tmp_path, MEMORY) == first
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"touched": [1, -1], "written": []}', b"\xff"])
def test_a_working_set_that_is_none_is_not_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert not read_working_set(tmp_path, MEMORY)


def test_a_working_set_beyond_the_end_of_memory_is_not_known(tmp_path: Path) -> None:
    keep_working_set(tmp_path, WorkingSet(((MEMORY, 4096),), ()))
    assert not read_working_set(tmp_path, MEMORY)


def test_neither_a_fifo_nor_a_link_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    assert not read_working_set(tmp_path, MEMORY)
    os.unlink(tmp_path / FILE)
    keep_working_set(tmp_path, WorkingSet(((0, 4096),), ()))
    os.rename(tmp_path / FILE, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / FILE)
    assert not read_working_set(tmp_path, MEMORY)


def test_where_it_cannot_be_kept_it_is_not(tmp_path: Path) -> None:
    keep_working_set(tmp_path / "nowhere", WorkingSet(((0, 4096),), ()))


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_directory_is_the_callers_or_the_policys() -> None:
    when = SnapshotResources(on_listener=True, quiesce_ms=7, out_path=Path("/policy"))
    assert SnapshotOrder(when=when).directory == Path("/policy")
    assert SnapshotOrder(when=when, out="/caller").directory == Path("/caller")
    assert SnapshotOrder().directory is None
    assert (SnapshotOrder(when=when).quiesce_ms, SnapshotOrder().quiesce_ms) == (7, 0)


@pytest.mark.parametrize("asked", [{"then": "explode"}, {"out": 5}, {"out": "a\0b"}])
def test_an_order_that_makes_no_sense_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SnapshotOrder(**asked)


def test_a_window_without_a_workload_is_refused() -> None:
    with pytest.raises(ConfigError):
        VMConfig(pre_exec_window=True)
