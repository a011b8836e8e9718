"""OpenTelemetry: a boot as spans, by whatever SDK the application has set up (extra ``otel``).

    vm = VM(config)
    trace_boot(vm)
    with tracer.start_as_current_span("request"):
        await vm.boot()

Every phase becomes a span ``asyncvmm.<phase>`` with its true times, below ``asyncvmm.total``, whose parent is the span
that is current where ``boot()`` is called. The guest's stages are events of the span in which the host waits for them.
What the guest wrote on its console is not in any span.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from asyncvmm.events.types import Event
from asyncvmm.export.extras import need
from asyncvmm.export.records import record_of
from asyncvmm.export.spans import BootSpans, Span

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer, TracerProvider

    from asyncvmm.vm import VM


def trace_boot(vm: VM, tracer_provider: TracerProvider | None = None) -> Callable[[], None]:
    """Have the VM's boot told as spans, once it is over; call it before ``boot()``. Returns a function that ends it.

    ``tracer_provider`` None takes the global one. Raises HostError without opentelemetry-api.
    """
    need("trace_boot", "opentelemetry.trace", "otel")
    from opentelemetry.trace import get_tracer

    tracer = get_tracer("asyncvmm", version("asyncvmm"), tracer_provider)
    epoch_ns = time.time_ns() - (vm.timeline.clock() - vm.timeline.start_ns)
    sink = SpanSink(tracer, vm.name, epoch_ns)
    sink.detach = vm.events.attach(sink)
    return sink.detach


class SpanSink:
    """A sink for an EventHub: collects one VM's boot and gives it to ``tracer`` when it is over.

    ``epoch_ns`` is the wall clock at the VM's start. The parent is the span current at the VM's first event.
    """

    def __init__(self, tracer: Tracer, vm: str, epoch_ns: int) -> None:
        self.detach: Callable[[], None] = lambda: None
        self._tracer = tracer
        self._vm = vm
        self._epoch_ns = epoch_ns
        self._spans = BootSpans()
        self._context: Context | None = None

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        from opentelemetry import context

        if self._context is None:  # boot() announces itself in the task that called it
            self._context = context.get_current()
        root = self._spans.take(record_of(event))
        if root is not None:
            self.detach()
            self._tell(root, self._context)

    def _tell(self, span: Span, parent: Context) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        told = self._tracer.start_span(
            f"asyncvmm.{span.name}",
            context=parent,
            start_time=self._epoch_ns + span.start_ns,
            attributes={"asyncvmm.vm": self._vm, "asyncvmm.accel": self._spans.accel or "unknown", **span.attributes},
        )
        for instant in span.instants:
            told.add_event(instant.name, dict(instant.attributes), self._epoch_ns + instant.t_ns)
        if span.error is not None:
            told.set_status(Status(StatusCode.ERROR, span.error))
        inside = set_span_in_context(told, parent)
        for child in span.children:
            self._tell(child, inside)
        told.end(self._epoch_ns + span.end_ns)
