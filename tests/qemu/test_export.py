"""A real boot as metrics and as spans: the same durations as its own phases, nested as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from asyncvmm import VM, VMConfig
from asyncvmm.errors import BootError
from asyncvmm.export.exposition import exposition
from asyncvmm.export.otel import trace_boot
from asyncvmm.export.prometheus import VmCollector
from tests.support.openmetrics import values_of

pytestmark = [pytest.mark.requires("qemu", "image"), pytest.mark.anyio]

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
SUM = "asyncvmm_phase_duration_seconds_sum"


def duration(span: ReadableSpan) -> int:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.end_time - span.start_time


def check_nesting(spans: dict[int, ReadableSpan], root: ReadableSpan) -> None:
    for span in spans.values():
        if span is root:
            continue
        assert span.parent is not None
        above = spans[span.parent.span_id]
        assert above.start_time is not None
        assert span.start_time is not None
        assert above.start_time <= span.start_time
        assert duration(span) + span.start_time <= duration(above) + above.start_time


def check_sums(spans: dict[int, ReadableSpan]) -> None:
    """What is left of a phase when its children are taken off is its residual."""
    for number, span in spans.items():
        residual = (span.attributes or {}).get("asyncvmm.residual_ns")
        if residual is not None:
            children = [other for other in spans.values() if other.parent and other.parent.span_id == number]
            assert sum(map(duration, children)) + int(str(residual)) == duration(span)


async def test_a_boot_in_metrics_spans_and_file_is_the_same(tmp_path: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    collector = VmCollector(CollectorRegistry())
    vm = VM(VMConfig(accel="qemu"))
    collector.watch(vm)
    trace_boot(vm, provider)
    vm.stream_to(tmp_path / "boot.jsonl")
    async with vm:
        with provider.get_tracer("test").start_as_current_span("request") as request:
            await vm.boot()
    spans = {span.context.span_id: span for span in exporter.get_finished_spans() if span.name != "request"}
    [root] = [
        span for span in spans.values() if span.parent and span.parent.span_id == request.get_span_context().span_id
    ]
    check_nesting(spans, root)
    check_sums(spans)
    assert (root.name, duration(root)) == ("asyncvmm.total", vm.timeline.durations()["total"])
    [wait] = [span for span in spans.values() if span.name == "asyncvmm.boot_wait"]
    assert {"guest.init_entry", "guest.ready"} <= {event.name for event in wait.events}

    values = values_of(exposition(collector.registry, "-").decode())
    assert values["asyncvmm_boots_total", "qemu", "ready"] == 1
    sums = {name: ns for name, ns in vm.timeline.durations().items() if name != "other"}
    assert {key[2]: value for key, value in values.items() if key[0] == SUM} == pytest.approx(
        {name: ns * 1e-9 for name, ns in sums.items()}
    )
    assert "other" not in {word for key in values for word in key}

    done = await anyio.run_process([str(ASYNCVMM), "metrics", str(tmp_path / "boot.jsonl")])
    of_file = values_of(done.stdout.decode())
    assert {key: value for key, value in of_file.items() if not key[0].endswith("_created")} == {
        key: value for key, value in values.items() if not key[0].endswith("_created")
    }


async def test_a_boot_that_fails_is_counted_and_told() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    collector = VmCollector()
    vm = VM(VMConfig(accel="qemu", boot_timeout_s=0.5))
    collector.watch(vm)
    trace_boot(vm, provider)
    with pytest.raises(BootError):
        await vm.boot()
    values = values_of(exposition(collector.registry, "-").decode())
    assert values["asyncvmm_boots_total", "qemu", "failed"] == 1
    assert values["asyncvmm_boot_failures_total", "qemu", "BootError", "timeout"] == 1
    assert values["asyncvmm_phase_failures_total", "qemu", "boot_wait", "boot"] == 1
    spans = {span.context.span_id: span for span in exporter.get_finished_spans()}
    [root] = [span for span in spans.values() if span.parent is None]
    check_nesting(spans, root)
    failed = {span.name for span in spans.values() if not span.status.is_ok}
    assert {"asyncvmm.total", "asyncvmm.boot", "asyncvmm.boot_wait"} <= failed
    assert dict(root.events[-1].attributes or {})["exception.type"] == "BootError"
