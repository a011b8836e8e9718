"""Tracing of exits: whether it is on, and who gets them. vCPU threads see the exits, the loop hands them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from asyncvmm.machine.kvm.exits import Exit
from asyncvmm.machine.kvm.vcpu import Vcpu


@attrs.frozen
class TracedExit:
    """One exit as ``trace_exits`` shows it: the vCPU's index, CLOCK_MONOTONIC ns, and the decoded exit."""

    vcpu: int
    t_ns: int
    exit: Exit


class TraceSink(Protocol):
    """Who takes the traced exits."""

    def put(self, traced: TracedExit) -> None:
        """One more."""

    def end(self) -> None:
        """No more will come."""


class Tracing:
    """One trace at a time. ``post`` carries an exit from a vCPU thread to the loop, where ``hand`` takes it."""

    def __init__(self, post: Callable[[TracedExit], object]) -> None:
        self._post = post
        self._sink: TraceSink | None = None

    def begin(self, sink: TraceSink, vcpus: Sequence[Vcpu]) -> None:
        """Hand every exit from now on to ``sink``; a former one ends."""
        self.end()
        self._sink = sink
        for vcpu in vcpus:
            vcpu.trace = self._trace
            vcpu.kick()

    def hand(self, traced: TracedExit) -> None:
        """Give an exit to who asked for it."""
        if self._sink is not None:
            self._sink.put(traced)

    def end(self) -> None:
        """No more exits will come."""
        if self._sink is not None:
            self._sink.end()

    def leave(self, sink: TraceSink, vcpus: Sequence[Vcpu]) -> None:
        """End what ``begin`` began for this one, unless another took over."""
        if self._sink is sink:
            self._sink = None
            for vcpu in vcpus:
                vcpu.trace = None
                vcpu.kick()  # so that it enters by the native run loop again

    def _trace(self, vcpu: int, t_ns: int, seen: Exit) -> None:
        """On a vCPU's thread."""
        self._post(TracedExit(vcpu, t_ns, seen))
