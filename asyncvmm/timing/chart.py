"""A recording laid out on one axis: rows of host phases, residuals, guest stages and instants. All drawings use these.

The axis is the boot: its ``total`` phase, in older files everything between the first phase's start and the last one's
end. Of a VM that was restored it is the restore, from its call to its last stage, and that is its total: the phase
``total``, which ends before, has another name here. What happened later keeps its time and is drawn at the edge, so
that a long workload does not crush a short boot. A guest stage cannot have come after its line: the host's clock bounds
what the guest says of itself. A stage that says more than the VM's age is off the axis: it is told with its value, and
takes no room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import attrs

from asyncvmm.timing.nesting import Node, nest, walk
from asyncvmm.timing.recording import TOTAL, RecordedInstant, RecordedPhase, RecordedStage, Recording
from asyncvmm.timing.text import duration_text, printable

MAX_ROWS = 1000
"""Rows of a VM that are drawn."""

_EXITS = 5
_OFF_AXIS = 5
_REASONS = 5
_MAPPED = "restore.mapped"

RESIDUAL = "residual"
GUEST = "guest"
RESTORE = "restore"
RESTORING = "restoring"
"""What the phase ``total`` of a restore is called here, which is not all of it."""

RowKind = Literal["phase", "residual", "stage", "ready", "mark", "error", "lost"]


@attrs.frozen
class Row:
    """One line of a drawing. ``duration_ns`` is None for an instant; ``label`` is harmless to show.

    ``path`` names it across boots; ``leaf`` says whether nothing lies in it. ``gaps`` are a residual's stretches.
    ``off_axis_ns`` is what a guest stage says that cannot be; it has no duration, and starts where its line came.
    ``reason`` says why something went wrong.
    """

    label: str
    kind: RowKind
    start_ns: int
    duration_ns: int | None = None
    depth: int = 0
    path: tuple[str, ...] = ()
    attempt: int = 0
    failed: bool = False
    leaf: bool = True
    gaps: tuple[tuple[int, int], ...] = ()
    off_axis_ns: int | None = None
    reason: str | None = None

    @property
    def end_ns(self) -> int:
        """When it ended; an instant's own time."""
        return self.start_ns + (self.duration_ns or 0)


@attrs.frozen
class Chart:
    """One VM's rows on the axis from ``start_ns`` to ``end_ns``; ``total_ns`` is what shares are of.

    ``total_spans`` says from where to where a restore's total is; a boot's needs no words. ``notes`` say what a reader
    must know about the figures, one sentence each.
    """

    recording: Recording
    start_ns: int
    end_ns: int
    total_ns: int
    host: tuple[Row, ...]
    guest: tuple[Row, ...]
    instants: tuple[Row, ...]
    restore: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    total_spans: str = ""

    @property
    def name(self) -> str:
        """The VM's name, harmless to show."""
        return printable(self.recording.vm)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows: host, restore, guest, instants."""
        return self.host + self.restore + self.guest + self.instants

    @property
    def span_ns(self) -> int:
        """Length of the axis, at least 1."""
        return max(1, self.end_ns - self.start_ns)

    def place(self, t_ns: int) -> float:
        """Where ``t_ns`` lies on the axis, from 0 to 1."""
        return min(1.0, max(0.0, (t_ns - self.start_ns) / self.span_ns))

    @property
    def headline(self) -> str:
        """What became of the boot or the restore, in a few words."""
        recording = self.recording
        accel = f" on {printable(recording.accel)}" if recording.accel else ""
        if recording.restore:
            said = [f"total {duration_text(self.total_ns)} {self.total_spans}"]
            said += [f"{stage} after {duration_text(ns)}" for stage, ns in self.restore_times]
            return f"restored{accel}, {', '.join(said)}"
        ready = recording.ready_ns
        if ready is not None:
            return f"total {duration_text(self.total_ns)}{accel}, READY at {duration_text(ready)}"
        outcome = "failed after" if recording.failed else "cancelled after" if recording.cancelled else "no READY in"
        what = "restore " if recording.what == RESTORE and recording.broken else ""
        return f"{what}{outcome} {duration_text(self.total_ns)}{accel}"

    @property
    def restore_times(self) -> list[tuple[str, int]]:
        """The stages of a restore in words, without the one that ends its total, and how long after its call they came,
        ns."""
        stages = self.recording.restore
        if stages and stages[-1].t_ns >= self.end_ns:
            stages = stages[:-1]
        return [(_words(stage.name), stage.since_call_ns) for stage in stages]


def lay_out(recording: Recording) -> Chart:
    """The chart of ``recording``."""
    tops, missing = nest(_named(recording))
    start_ns, end_ns, total_ns = _axis(recording)
    host = list(_host_rows(tops, recording.attempts > 1))
    guest, restore = tuple(_guest_rows(recording, end_ns)), tuple(_restore_rows(recording, start_ns))
    instants = [_instant(instant) for instant in recording.instants]
    notes = [*_notes(recording, missing), *_off_axis_notes(recording, end_ns), *_reasons(instants)]
    if (more := len(host) - MAX_ROWS) > 0:
        notes.append(f"{more} more phases are not drawn")
    if (more := len(instants) - MAX_ROWS) > 0:
        notes.append(f"{more} more instants are not drawn")
    drawn = tuple(host[:MAX_ROWS]), guest, tuple(instants[:MAX_ROWS]), restore
    return Chart(recording, start_ns, end_ns, total_ns, *drawn, tuple(notes), _total_spans(recording, end_ns))


def _named(recording: Recording) -> Sequence[RecordedPhase]:
    """Its phases. A restore goes on after the one that is called its total in the file."""
    if recording.what != RESTORE:
        return recording.phases
    names: dict[str | None, str] = {TOTAL: RESTORING}
    return [
        attrs.evolve(phase, name=names.get(phase.name, phase.name), parent=names.get(phase.parent, phase.parent))
        for phase in recording.phases
    ]


def _total_spans(recording: Recording, end_ns: int) -> str:
    if not recording.restore:
        return ""
    last = recording.restore[-1]
    if last.t_ns < end_ns:
        return "from call until in place"
    return "from call until mapped" if last.name == _MAPPED else f"from call to {_words(last.name)}"


def _words(stage: str) -> str:
    return printable(stage.removeprefix(f"{RESTORE}.").replace("_", " "))


def _axis(recording: Recording) -> tuple[int, int, int]:
    start_ns, end_ns, total_ns = _boot_axis(recording)
    if recording.restore:
        called_ns, last_ns = max(0, _called_ns(recording)), recording.restore[-1].t_ns
        start_ns = min(start_ns, called_ns) if recording.phases else called_ns
        end_ns = max(end_ns, last_ns) if recording.phases else last_ns
        total_ns = end_ns - min(start_ns, _called_ns(recording))
    return start_ns, end_ns, total_ns


def _called_ns(recording: Recording) -> int:
    # The latest, for a stage's two figures are two looks at the clock, of which the second is the later one.
    return max(stage.t_ns - stage.since_call_ns for stage in recording.restore)


def _boot_axis(recording: Recording) -> tuple[int, int, int]:
    phases = recording.phases
    spans = [phase for phase in phases if phase.name == TOTAL and phase.parent is None] or list(phases)
    if spans:
        start_ns, end_ns = min(phase.start_ns for phase in spans), max(phase.end_ns for phase in spans)
        return start_ns, end_ns, end_ns - start_ns
    times = [instant.t_ns for instant in recording.instants]
    times += [stage.arrived_ns for stage in recording.stages if stage.arrived_ns is not None]
    end_ns = max(times, default=0)
    return 0, end_ns, end_ns


def _host_rows(tops: Sequence[Node], attempts: bool) -> Iterator[Row]:
    waiting: list[Node] = []
    for node in walk(tops):
        while waiting and node.depth <= waiting[-1].depth:
            yield from _residual(waiting.pop())
        yield _phase(node, attempts)
        waiting.append(node)
    while waiting:
        yield from _residual(waiting.pop())


def _phase(node: Node, attempts: bool) -> Row:
    phase = node.phase
    label = printable(phase.name) + (f" (attempt {phase.attempt})" if attempts and phase.name != TOTAL else "")
    return Row(
        label,
        "phase",
        phase.start_ns,
        phase.duration_ns,
        node.depth,
        node.path,
        phase.attempt,
        phase.failed,
        not node.children,
    )


def _residual(node: Node) -> Iterator[Row]:
    residual_ns = node.residual_ns
    if residual_ns > 0 and node.children:
        gaps, path, phase = node.gaps(), (*node.path, RESIDUAL), node.phase
        start_ns = gaps[0][0] if gaps else phase.start_ns
        label = f"residual of {printable(phase.name)}"
        yield Row(label, "residual", start_ns, residual_ns, node.depth + 1, path, phase.attempt, gaps=gaps[:MAX_ROWS])


def _restore_rows(recording: Recording, start_ns: int) -> Iterator[Row]:
    before_ns = max(start_ns, _called_ns(recording)) if recording.restore else 0
    for stage in recording.restore:
        took_ns = stage.t_ns - before_ns
        yield Row(printable(stage.name), "stage", before_ns, took_ns, path=(RESTORE, stage.name))
        before_ns = stage.t_ns


def _guest_rows(recording: Recording, end_ns: int) -> Iterator[Row]:
    before_ns = 0
    for stage in recording.stages:
        if recording.clock is None and stage.arrived_ns is None:
            continue
        label, path, latest = printable(stage.name), (GUEST, stage.name), _latest(stage, end_ns)
        if stage.guest_ns > latest:
            yield Row(label, "stage", latest, path=path, off_axis_ns=stage.guest_ns)
            continue
        took_ns, before_ns = stage.guest_ns - before_ns, stage.guest_ns
        yield Row(label, "stage", max(0, _reached(recording, stage, latest) - took_ns), took_ns, path=path)


def _latest(stage: RecordedStage, end_ns: int) -> int:
    return end_ns if stage.arrived_ns is None else stage.arrived_ns


def _reached(recording: Recording, stage: RecordedStage, latest: int) -> int:
    if recording.clock is None:
        return latest
    return min(latest, max(0, stage.guest_ns + recording.clock.offset_ns))


def _instant(instant: RecordedInstant) -> Row:
    reason = None if instant.reason is None else printable(instant.reason)
    return Row(printable(instant.label), instant.kind, instant.t_ns, reason=reason)


def _notes(recording: Recording, missing: Sequence[str]) -> Iterator[str]:
    if recording.stages:
        yield _clock_note(recording)
    if recording.phases and not recording.restore and not any(phase.name == TOTAL for phase in recording.phases):
        yield "no total phase in the file: total is from the first phase's start to the last one's end"
    yield from _restore_notes(recording)
    if missing:
        names = ", ".join(printable(name, 40) for name in missing[:5])
        yield f"parents that are not in the file: {names}{', …' if len(missing) > 5 else ''}"
    if recording.lost_lines:
        yield f"{recording.lost_lines} lines were lost on the way to the file: figures may be missing"
    if recording.exits:
        most = sorted(recording.exits.items(), key=lambda entry: -entry[1])[:_EXITS]
        yield f"KVM exits: {', '.join(f'{count} {printable(reason, 40)}' for reason, count in most)}"
    if recording.attempts > 1:
        yield f"{min(recording.attempts, 1 + len(recording.phases))} boot attempts"


def _restore_notes(recording: Recording) -> Iterator[str]:
    if recording.restore and any(phase.name == TOTAL for phase in recording.phases):
        yield f"{RESTORING} is the phase {TOTAL} in the file: from the call until memory and state are in place"
    if recording.restore and (called_ns := _called_ns(recording)) < 0:
        yield f"the restore was called {duration_text(-called_ns)} before the VM's start, where the axis begins"
    if recording.faults is not None:
        minor, major = recording.faults
        yield f"page faults until the first guest event: {minor} minor, {major} major"


def _reasons(instants: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in instants if row.reason is not None]
    for row in rows[:_REASONS]:
        yield f"{row.label} (at {duration_text(row.start_ns)}): {row.reason}"
    if (more := len(rows) - _REASONS) > 0:
        yield f"{more} more snapshot{'s' * (more > 1)} failed"


def _clock_note(recording: Recording) -> str:
    clock = recording.clock
    if clock is None:
        return "guest stages stand where their lines arrived: the file has no guest clock"
    source = "by its TSC" if clock.source == "tsc" else f"({printable(clock.source, 20)})"
    return f"guest clock tied to the host's {source}, off by at most {duration_text(clock.error_ns)}"


def _off_axis_notes(recording: Recording, end_ns: int) -> Iterator[str]:
    stages = {stage.name: stage for stage in recording.stages}
    rows = [row for row in _guest_rows(recording, end_ns) if row.off_axis_ns is not None]
    for row in rows[:_OFF_AXIS]:
        known = "the boot ended" if stages[row.path[1]].arrived_ns is None else "its line came"
        said, came = duration_text(row.off_axis_ns or 0), duration_text(row.start_ns)
        yield f"off the axis, {row.label} says {said}: {known} after {came}"
    if (more := len(rows) - _OFF_AXIS) > 0:
        yield f"off the axis are {more} more guest stages"
