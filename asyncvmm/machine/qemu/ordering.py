"""Where console bytes go among control lines that were read together with them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.effects import SerialOutput

EXIT_LINE = b"workload-exit"


def split_before_exit(control: Sequence[SerialOutput]) -> tuple[list[SerialOutput], list[SerialOutput]]:
    """Cut the control line's output before a line that ends the workload, or may become one when its rest arrives."""
    before: list[SerialOutput] = []
    for index, output in enumerate(control):
        start = _exit_starts(output.data)
        if start is None:
            before.append(output)
            continue
        lines = output.data[:start].count(b"\n")
        head = attrs.evolve(output, data=output.data[:start], newlines=output.newlines[:lines], lost=0)
        tail = attrs.evolve(output, data=output.data[start:], newlines=output.newlines[lines:])
        return [*before, *([head] if start else [])], [tail, *control[index + 1 :]]
    return before, []


def _exit_starts(data: bytes) -> int | None:
    start = 0
    for line in data.splitlines(keepends=True):
        if line.startswith(EXIT_LINE) or (line and not line.endswith(b"\n") and EXIT_LINE.startswith(line)):
            return start
        start += len(line)
    return None
