"""Where console bytes go among control lines that were read together with them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.effects import SerialOutput

END_LINES = (b"workload-exit", b"init-error")
"""Before each of these PID 1 drains its console."""


def split_before_end(control: Sequence[SerialOutput]) -> tuple[list[SerialOutput], list[SerialOutput]]:
    """Cut the control line's output before a line that ends workload or boot, or may become one with its rest."""
    before: list[SerialOutput] = []
    for index, output in enumerate(control):
        start = _end_starts(output.data)
        if start is None:
            before.append(output)
            continue
        lines = output.data[:start].count(b"\n")
        head = attrs.evolve(output, data=output.data[:start], newlines=output.newlines[:lines], lost=0)
        tail = attrs.evolve(output, data=output.data[start:], newlines=output.newlines[lines:])
        return [*before, *([head] if start else [])], [tail, *control[index + 1 :]]
    return before, []


def _end_starts(data: bytes) -> int | None:
    start = 0
    for line in data.splitlines(keepends=True):
        if line.startswith(END_LINES) or (not line.endswith(b"\n") and any(end.startswith(line) for end in END_LINES)):
            return start
        start += len(line)
    return None
