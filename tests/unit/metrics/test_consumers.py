"""What reads event lines passes over those of metrics, and counts none of them as strange."""

from __future__ import annotations

from asyncvmm.events.encoding import to_line
from asyncvmm.events.types import Metrics
from asyncvmm.export.facts import Fold
from asyncvmm.export.records import read_record, record_of
from asyncvmm.export.spans import BootSpans
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.timing.reading import read_recordings


def event() -> Metrics:
    metrics = VmMetrics()
    metrics.block("root").read_count += 1
    return metrics.flush(5, 1_763_692_533_123)


def test_the_exporters_pass_over_metrics() -> None:
    record = read_record(to_line(event(), "a1b2", 0))
    assert Fold().of(record) == []
    assert BootSpans().take(record) is None
    assert record_of(event()).items() <= record.items()


def test_the_timeline_passes_over_metrics() -> None:
    reading = read_recordings([to_line(event(), "a1b2", 0)], "boot.jsonl")
    assert reading.remarks == ()
