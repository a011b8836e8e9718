"""Which phase lies in which: the tree of a recording's phases, found from their times and their parents' names.

A line names its parent, and names repeat (attempts, loops): the parent is the phase of that name that is open when the
child starts. So no circle can come about, whatever a file says. A parent that is not there leaves its children at the
top, and is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from asyncvmm.timing.recording import RecordedPhase

MAX_DEPTH = 24
"""Levels that are told apart; what is nested deeper stands on the last."""


@attrs.define(eq=False)
class Node:
    """A phase with those in it, by start. ``path`` is the names from the top down to its own."""

    phase: RecordedPhase
    path: tuple[str, ...]
    children: list[Node] = attrs.field(factory=list)

    @property
    def depth(self) -> int:
        """How many phases it lies in."""
        return len(self.path) - 1

    @property
    def residual_ns(self) -> int:
        """What its children leave over: as the file says, else counted here. 0 for a phase without children."""
        if self.phase.residual_ns is not None:
            return min(self.phase.residual_ns, self.phase.duration_ns)
        if not self.children:
            return 0
        return max(0, self.phase.duration_ns - sum(child.phase.duration_ns for child in self.children))

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The stretches, from and to, in which none of its children ran."""
        gaps, reached = [], self.phase.start_ns
        for child in self.children:
            if child.phase.start_ns > reached:
                gaps.append((reached, min(child.phase.start_ns, self.phase.end_ns)))
            reached = max(reached, child.phase.end_ns)
        if reached < self.phase.end_ns:
            gaps.append((reached, self.phase.end_ns))
        return tuple(gaps)


def nest(phases: Sequence[RecordedPhase]) -> tuple[list[Node], list[str]]:
    """The phases at the top, by start, with all others in them; and the names of parents that are not there."""
    tops: list[Node] = []
    missing: dict[str, None] = {}
    still_open: dict[str, list[Node]] = {}
    for phase in sorted(phases, key=_outer_first):
        parent = None if phase.parent is None else _open_at(still_open.get(phase.parent, []), phase.start_ns)
        if phase.parent is not None and parent is None:
            missing[phase.parent] = None
        node = Node(phase, (*_path_of(parent), phase.name))
        (tops if parent is None else parent.children).append(node)
        still_open.setdefault(phase.name, []).append(node)
    return tops, list(missing)


def walk(tops: Sequence[Node]) -> Iterator[Node]:
    """Every node, parents before their children, by start."""
    rest = list(reversed(tops))
    while rest:
        node = rest.pop()
        yield node
        rest.extend(reversed(node.children))


def _outer_first(phase: RecordedPhase) -> tuple[int, int, int]:
    # Of two that start and end together the outer one is told later: phases are told as they end.
    return phase.start_ns, -phase.duration_ns, -phase.line


def _open_at(stack: list[Node], t_ns: int) -> Node | None:
    while stack and stack[-1].phase.end_ns < t_ns:
        stack.pop()
    return stack[-1] if stack else None


def _path_of(parent: Node | None) -> tuple[str, ...]:
    return () if parent is None else parent.path[: MAX_DEPTH - 1]
