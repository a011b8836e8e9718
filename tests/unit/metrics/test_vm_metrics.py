from __future__ import annotations

import logging
from threading import Thread

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ConfigError
from asyncvmm.events.encoding import to_line
from asyncvmm.events.types import Metrics
from asyncvmm.metrics.groups import GROUPS
from asyncvmm.metrics.vm_metrics import VmMetrics
from tests.support.lines import VALIDATOR


@pytest.fixture
def metrics() -> VmMetrics:
    return VmMetrics()


def flushed(metrics: VmMetrics) -> Metrics:
    event = metrics.flush(7, 1_763_692_533_123)
    VALIDATOR.validate(orjson.loads(to_line(event, "a1b2", 0)))
    return event


def test_every_group_is_there_from_the_start_and_says_nothing(metrics: VmMetrics) -> None:
    event = flushed(metrics)
    assert (event.t_ns, event.utc_timestamp_ms) == (7, 1_763_692_533_123)
    assert list(event.groups) == sorted(GROUPS)
    assert event.groups == {name: kind().flush() for name, kind in GROUPS.items()}


def test_the_groups_stand_beside_the_envelope_of_the_line(metrics: VmMetrics) -> None:
    metrics.balloon.inflate_count += 2
    record = orjson.loads(to_line(flushed(metrics), "a1b2", 0))
    assert list(record)[:7] == ["v", "ts", "t_ns", "vm", "event", "utc_timestamp_ms", "balloon"]
    assert record["event"] == "metrics"
    assert record["balloon"]["inflate_count"] == 2


def test_a_flush_tells_each_count_once(metrics: VmMetrics) -> None:
    metrics.balloon.deflate_count += 1
    metrics.latencies_us.pause_vm = 40
    assert flushed(metrics).groups["balloon"]["deflate_count"] == 1
    event = flushed(metrics)
    assert event.groups["balloon"]["deflate_count"] == 0
    assert event.groups["latencies_us"]["pause_vm"] == 40


def test_disks_and_cards_are_told_one_by_one_and_summed(metrics: VmMetrics) -> None:
    metrics.block("root").read_count += 2
    metrics.block("root").read_agg.record(5)
    metrics.block("data-1").read_count += 3
    metrics.block("data-1").read_agg.record(9)
    metrics.net("eth0").tx_bytes_count += 60
    groups = flushed(metrics).groups
    assert [groups[name]["read_count"] for name in ("block_root", "block_data-1", "block")] == [2, 3, 5]
    assert groups["block"]["read_agg"] == {"min_us": 5, "max_us": 9, "sum_us": 14}
    assert groups["net_eth0"] == groups["net"]
    assert groups["net"]["tx_bytes_count"] == 60
    assert flushed(metrics).groups["block"]["read_count"] == 0


def test_a_device_asked_for_again_counts_on(metrics: VmMetrics) -> None:
    metrics.net("eth0").rx_count += 1
    metrics.net("eth0").rx_count += 1
    assert flushed(metrics).groups["net_eth0"]["rx_count"] == 2


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 1 << 40), st.booleans())))
def test_the_sum_is_the_sum_in_every_flush(steps: list[tuple[str, int, bool]]) -> None:
    metrics = VmMetrics()
    since = total = 0
    for drive, amount, flush in steps:
        metrics.block(drive).write_bytes += amount
        since += amount
        if flush:
            groups = metrics.flush(0, 0).groups
            parts = [group["write_bytes"] for name, group in groups.items() if name.startswith("block_")]
            assert groups["block"]["write_bytes"] == since == sum(part for part in parts if isinstance(part, int))
            since, total = 0, total + since
    assert total + since == sum(amount for _, amount, _ in steps)


def test_two_vms_share_nothing() -> None:
    one, other = VmMetrics(), VmMetrics()
    one.vsock.conns_added += 1
    one.block("root").read_count += 1
    one.flush(0, 0)
    groups = flushed(other).groups
    assert groups["vsock"]["conns_added"] == 0
    assert "block_root" not in groups


def test_a_source_is_asked_before_each_flush(metrics: VmMetrics) -> None:
    written = iter((10, 25))

    def source() -> None:
        metrics.uart.write_count = next(written)

    metrics.count_by("uart", source)
    assert [flushed(metrics).groups["uart"]["write_count"] for _ in range(2)] == [10, 15]


def test_a_second_machine_counts_from_0(metrics: VmMetrics) -> None:
    metrics.count_by("uart", lambda: setattr(metrics.uart, "write_count", 100))
    flushed(metrics)
    metrics.count_by("uart", lambda: setattr(metrics.uart, "write_count", 30))
    assert [flushed(metrics).groups["uart"]["write_count"] for _ in range(2)] == [30, 0]


def test_a_source_that_fails_is_logged_and_the_rest_is_told(
    metrics: VmMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise OSError("gone")

    metrics.count_by("uart", broken)
    metrics.count_by("i8042", lambda: setattr(metrics.i8042, "reset_count", 1))
    with caplog.at_level(logging.ERROR, "asyncvmm.metrics"):
        groups = flushed(metrics).groups
    assert "uart" in caplog.text
    assert groups["uart"]["write_count"] == 0
    assert groups["i8042"]["reset_count"] == 1


@pytest.mark.parametrize("name", ["block", "net", "block_root", "nonsense", ""])
def test_a_source_is_of_a_group_there_is_one_of(metrics: VmMetrics, name: str) -> None:
    with pytest.raises(ConfigError):
        metrics.count_by(name, lambda: None)


def test_counts_of_another_thread_all_arrive(metrics: VmMetrics) -> None:
    amount, told = 200_000, 0
    entropy = metrics.entropy

    def count() -> None:
        for _ in range(amount):
            entropy.entropy_bytes += 1

    thread = Thread(target=count)
    thread.start()
    while thread.is_alive():
        told += _bytes(metrics)
    assert told + _bytes(metrics) == amount


def _bytes(metrics: VmMetrics) -> int:
    told = metrics.flush(0, 0).groups["entropy"]["entropy_bytes"]
    assert isinstance(told, int)
    assert told >= 0
    return told
