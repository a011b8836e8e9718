"""Spans as OpenTelemetry's SDK is given them."""

from __future__ import annotations

import sys
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asyncvmm import VM
from asyncvmm.errors import BootError, HostError
from asyncvmm.events.types import AccelProbe, PhaseEnded, VmError, VmState
from asyncvmm.export.otel import trace_boot


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where finished spans go."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    """An SDK that is nobody else's."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def boots(vm: VM) -> None:
    vm.events.publish(VmState(0, "starting", "new"))
    vm.events.publish(AccelProbe(1, "kvm"))
    vm.events.publish(PhaseEnded(20, "boot", 10, 10, "total"))


def ends(vm: VM, final: str, *, failed: bool = False) -> None:
    vm.events.publish(PhaseEnded(25, "total", 0, 25, failed=failed, residual_ns=15))
    vm.events.publish(VmState(30, final, "booting"))


def test_phases_are_spans_below_the_callers(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    vm = VM()
    trace_boot(vm, provider)
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("request") as request:
        boots(vm)
    ends(vm, "stopped")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"request", "asyncvmm.total", "asyncvmm.boot"}
    total, boot = spans["asyncvmm.total"], spans["asyncvmm.boot"]
    assert total.parent is not None
    assert boot.parent is not None
    assert (total.parent.span_id, boot.parent.span_id) == (request.get_span_context().span_id, total.context.span_id)
    assert dict(total.attributes or {}) == {
        "asyncvmm.vm": vm.name,
        "asyncvmm.accel": "kvm",
        "asyncvmm.attempt": 0,
        "asyncvmm.residual_ns": 15,
    }
    assert total.status.status_code is StatusCode.UNSET


def test_times_are_those_of_the_wall_clock(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    before = time.time_ns()
    vm = VM()
    after = time.time_ns()
    trace_boot(vm, provider)
    boots(vm)
    ends(vm, "stopped")
    boot, total = exporter.get_finished_spans()
    assert total.start_time is not None
    assert boot.start_time is not None
    assert boot.end_time is not None
    assert before - 1_000_000_000 <= total.start_time <= after + 1_000_000_000
    assert (boot.start_time - total.start_time, boot.end_time - boot.start_time) == (10, 10)


def test_a_failed_boot_is_an_error_with_its_facts(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    vm = VM()
    trace_boot(vm, provider)
    boots(vm)
    vm.events.publish(VmError.of(22, BootError("boot", reason="timeout", expected="READY", found="nothing")))
    ends(vm, "failed", failed=True)
    total = exporter.get_finished_spans()[-1]
    assert total.status.status_code is StatusCode.ERROR
    assert total.status.description == "boot: expected READY, found nothing"
    [exception] = total.events
    assert exception.name == "exception"
    assert dict(exception.attributes or {})["asyncvmm.reason"] == "timeout"


def test_a_boot_is_told_once(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    vm = VM()
    trace_boot(vm, provider)
    boots(vm)
    ends(vm, "failed")
    assert not vm.events.listening
    ends(vm, "stopped")
    assert len(exporter.get_finished_spans()) == 2


def test_what_is_ended_is_not_told(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    vm = VM()
    end = trace_boot(vm, provider)
    boots(vm)
    end()
    ends(vm, "stopped")
    assert not exporter.get_finished_spans()


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HostError, match=r"asyncvmm\[otel\]"):
        trace_boot(VM())
