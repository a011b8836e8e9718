"""Reads JSON lines of asyncvmm into recordings, whatever a file holds: what is not understood is told by line, the rest
is kept. Nothing here raises for the content of a line, and what is kept is bounded.

The envelope and the fields are those of ``asyncvmm schema``. Lines of a newer version are read as far as they are
understood; files of older programs lack ``total``, ``residual_ns`` and ``guest_clock``, which are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs
import orjson

from asyncvmm.timing import fields
from asyncvmm.timing.fields import BadField
from asyncvmm.timing.recording import (
    RecordedClock,
    RecordedInstant,
    RecordedPhase,
    RecordedStage,
    Recording,
    RestoreStage,
)

VERSION = 1
"""The ``v`` that is understood whole."""

MAX_LINE = 1 << 20
"""Bytes of a line that are looked at; longer ones are passed over."""

MAX_REMARKS = 10
"""Lines not understood that are named; of more, only the number is told."""

MAX_KEPT = 100_000
"""Phases, stages and instants of a file that are kept."""

MAX_VMS = 10_000
"""VMs of a file that are kept."""

MAX_STAGES = 64
"""Guest stages of a VM that are kept."""

FOREIGN = "not an event of asyncvmm"

_CANCELLED = "CancelledError"

Event = Mapping[str, object]


@attrs.frozen
class Reading:
    """What a file held: its VMs in the order in which they come, and what was not understood, ready to print."""

    source: str
    recordings: tuple[Recording, ...]
    remarks: tuple[str, ...] = ()


def capped_lines(readline: Callable[[int], bytes], cap: int = MAX_LINE) -> Iterator[bytes | None]:
    """The lines that ``readline(most)`` gives, newlines included; None for a line of more than ``cap`` bytes."""
    while line := readline(cap + 1):
        if len(line) <= cap or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = readline(cap)
        yield None


def read_recordings(lines: Iterable[bytes | None], source: str) -> Reading:
    """Read a file's lines; None stands for a line that was too long to be looked at."""
    reader = _Reader(source)
    for number, line in enumerate(lines, 1):
        reader.take(number, line)
    return reader.reading()


class _Remarks:
    """The first few remarks, and how many more there would be."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._more = 0

    def add(self, number: int, remark: str) -> None:
        if len(self._first) < MAX_REMARKS:
            self._first.append(f"line {number}: {remark}")
        else:
            self._more += 1

    def told(self) -> tuple[str, ...]:
        more = [f"and {self._more} more line{'s' * (self._more > 1)}"] if self._more else []
        return (*self._first, *more)


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._vms: dict[str, _Vm] = {}
        self._remarks = _Remarks()
        self._newer = False
        self._kept = 0
        self._left_out = 0

    def take(self, number: int, line: bytes | None) -> None:
        if line is None:
            self._remarks.add(number, f"longer than {MAX_LINE} bytes")
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return
        event = _object(line)
        if event is None:
            cut = not line.endswith(b"\n") and line.lstrip().startswith(b"{")
            self._remarks.add(number, "cut off: the file ends in the middle of it" if cut else FOREIGN)
            return
        try:
            self._event(number, event)
        except BadField as bad:
            self._remarks.add(number, str(bad))

    def _event(self, number: int, event: Event) -> None:
        if not {"v", "vm", "event", "t_ns"} <= event.keys():
            self._remarks.add(number, FOREIGN)
            return
        version = fields.whole(event, "v")
        if version < 1:
            raise BadField("v", f"version 1 to {VERSION}", version)
        t_ns, name, kind = fields.whole(event, "t_ns"), fields.text(event, "vm"), fields.text(event, "event")
        if version > VERSION and not self._newer:
            self._newer = True
            self._remarks.add(number, f"version {version}, newer than {VERSION}: read as far as it is understood")
        take = _TAKE.get(kind)
        vm = self._vm(name)
        if take is None or vm is None:
            return
        if self._kept >= MAX_KEPT and kind in _COUNTED:
            self._left_out += 1
            return
        take(vm, event, t_ns, number)
        self._kept += kind in _COUNTED

    def _vm(self, name: str) -> _Vm | None:
        vm = self._vms.get(name)
        if vm is None and len(self._vms) < MAX_VMS:
            vm = self._vms[name] = _Vm()
        self._left_out += vm is None
        return vm

    def reading(self) -> Reading:
        remarks = list(self._remarks.told())
        if self._left_out:
            remarks.append(f"{self._left_out} events left out: at most {MAX_KEPT} events of {MAX_VMS} VMs are kept")
        recordings = tuple(vm.recording(self._source, name) for name, vm in self._vms.items())
        return Reading(self._source, recordings, tuple(remarks))


def _object(line: bytes) -> Event | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


class _Vm:
    """What is known of one VM so far."""

    def __init__(self) -> None:
        self.phases: list[RecordedPhase] = []
        self.stages: dict[str, RecordedStage] = {}
        self.instants: list[RecordedInstant] = []
        self.restore: dict[str, RestoreStage] = {}
        self.facts: dict[str, object] = {}
        self.lost = 0

    def recording(self, source: str, name: str) -> Recording:
        stages = sorted(self.stages.values(), key=lambda stage: stage.guest_ns)
        instants = sorted(self.instants, key=lambda instant: instant.t_ns)
        restore = sorted(self.restore.values(), key=lambda stage: stage.t_ns)
        return Recording(
            source,
            name,
            tuple(self.phases),
            tuple(stages),
            tuple(instants),
            tuple(restore),
            lost_lines=self.lost,
            **self.facts,  # type: ignore[arg-type]
        )

    def phase(self, event: Event, _: int, line: int) -> None:
        """A phase of host work."""
        phase = RecordedPhase(
            fields.text(event, "name"),
            fields.whole(event, "start_ns"),
            fields.whole(event, "duration_ns"),
            fields.maybe_text(event, "parent"),
            fields.flag(event, "failed"),
            fields.maybe_whole(event, "attempt") or 0,
            fields.maybe_whole(event, "residual_ns"),
            line,
        )
        self.phases.append(phase)

    def stage(self, event: Event, t_ns: int, _: int) -> None:
        """A stage of the guest; a repeated one keeps its last value."""
        name = fields.text(event, "stage")
        guest_ns = fields.whole(event, "guest_ns", most=fields.MAX_GUEST_NS)
        if name not in self.stages and len(self.stages) >= MAX_STAGES:
            raise BadField("stage", f"at most {MAX_STAGES} of them", name)
        self.stages[name] = RecordedStage(name, guest_ns, t_ns)

    def state(self, event: Event, _: int, __: int) -> None:
        """The state the VM went into, and what it is made of."""
        self.facts["state"] = fields.text(event, "state")
        for fact, name in (("accel", "accel"), ("made_of", "snapshot")):
            if (said := fields.maybe_text(event, name)) is not None:
                self.facts[fact] = said
        if exits := fields.numbers(fields.mapping(event, "exits")):
            self.facts["exits"] = exits

    def probe(self, event: Event, _: int, __: int) -> None:
        """Which accelerator was taken."""
        self.facts["accel"] = fields.text(event, "accel")

    def timing(self, event: Event, _: int, __: int) -> None:
        """The VmTiming."""
        self.facts["timing"] = _without_envelope(fields.numbers(event))

    def profile(self, event: Event, _: int, __: int) -> None:
        """The BootProfile, with the guest's stages and clock."""
        self.facts["profile"] = _without_envelope(fields.numbers(event))
        for name, guest_ns in fields.numbers(fields.mapping(event, "guest"), fields.MAX_GUEST_NS).items():
            stage = name.removesuffix("_ns")
            if len(self.stages) < MAX_STAGES:
                self.stages.setdefault(stage, RecordedStage(stage, guest_ns))
        if clock := fields.mapping(event, "guest_clock"):
            self.facts["clock"] = _clock(clock)

    def lost_lines(self, event: Event, t_ns: int, _: int) -> None:
        """Lines that the sink dropped."""
        count = fields.whole(event, "lines")
        self.lost += count
        self.instants.append(RecordedInstant(f"{count} lines lost", t_ns, "lost"))

    def ready(self, _: Event, t_ns: int, __: int) -> None:
        """READY."""
        self.instants.append(RecordedInstant("READY", t_ns, "ready"))

    def pre_exec(self, _: Event, t_ns: int, __: int) -> None:
        """The workload is about to run."""
        self.instants.append(RecordedInstant("workload starts", t_ns))

    def listener(self, event: Event, t_ns: int, _: int) -> None:
        """A port is listened on."""
        label = f"listens on {fields.text(event, 'proto')} {fields.whole(event, 'port')}"
        self.instants.append(RecordedInstant(label, t_ns))

    def exit(self, event: Event, t_ns: int, _: int) -> None:
        """The workload ended."""
        code = fields.whole(event, "code", least=-fields.MAX_INT)
        self.instants.append(RecordedInstant(f"workload exits with {code}", t_ns))

    def error(self, event: Event, t_ns: int, _: int) -> None:
        """An error of the VM."""
        self.instants.append(RecordedInstant(f"error: {fields.text(event, 'what')}", t_ns, "error"))

    def saved(self, event: Event, t_ns: int, line: int) -> None:
        """A snapshot is on disk, and when its guest stood still."""
        if (paused_ns := fields.maybe_whole(event, "paused_ns")) is not None:
            self.instants.append(RecordedInstant("paused", paused_ns))
        self.mark(event, t_ns, line)

    def not_saved(self, event: Event, t_ns: int, _: int) -> None:
        """A snapshot that was asked for is none, and why."""
        trigger, kind = fields.maybe_text(event, "trigger") or "", fields.maybe_text(event, "kind")
        facts = {name: fields.maybe_text(event, name) for name in ("expected", "found", "state", "reason")}
        said = ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None)
        words = ("cancelled",) if kind == _CANCELLED else (kind, fields.maybe_text(event, "what"))
        what = ", ".join(word for word in words if word)
        reason = f"{what}: {said}" if said else what
        self.instants.append(RecordedInstant(f"snapshot.failed {trigger}".rstrip(), t_ns, reason=reason or None))

    def restore_stage(self, event: Event, t_ns: int, _: int) -> None:
        """A restore has come so far."""
        name = fields.text(event, "event")
        self.restore[name] = RestoreStage(name, t_ns, fields.whole(event, "duration_ns"))
        minor, major = fields.maybe_whole(event, "minor_faults"), fields.maybe_whole(event, "major_faults")
        if minor is not None and major is not None:
            self.facts["faults"] = minor, major

    def named_mark(self, event: Event, t_ns: int, _: int) -> None:
        """A trigger or a step, by its name."""
        name = fields.maybe_text(event, "trigger") or fields.maybe_text(event, "step") or ""
        self.instants.append(RecordedInstant(f"{fields.text(event, 'event')} {name}".rstrip(), t_ns))

    def mark(self, event: Event, t_ns: int, _: int) -> None:
        """An event that is its own label."""
        self.instants.append(RecordedInstant(fields.text(event, "event"), t_ns))


def _clock(clock: Event) -> RecordedClock:
    offset = fields.whole(clock, "offset_ns", least=-fields.MAX_GUEST_NS)
    return RecordedClock(offset, fields.whole(clock, "error_ns"), fields.text(clock, "source"))


def _without_envelope(numbers: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in numbers.items() if name not in ("v", "t_ns")}


_Take = Callable[[_Vm, Event, int, int], None]

_TAKE: Mapping[str, _Take] = {
    "phase": _Vm.phase,
    "guest.boot_time": _Vm.stage,
    "guest.ready": _Vm.ready,
    "guest.pre_exec": _Vm.pre_exec,
    "guest.listener": _Vm.listener,
    "guest.exit": _Vm.exit,
    "vm.state": _Vm.state,
    "vm.timing": _Vm.timing,
    "vm.error": _Vm.error,
    "accel.probe": _Vm.probe,
    "boot.profile": _Vm.profile,
    "log.lost": _Vm.lost_lines,
    "snapshot.trigger": _Vm.named_mark,
    "snapshot.saved": _Vm.saved,
    "snapshot.failed": _Vm.not_saved,
    "restore.mapped": _Vm.restore_stage,
    "restore.first_exit": _Vm.restore_stage,
    "restore.first_guest_event": _Vm.restore_stage,
    "restore.step": _Vm.named_mark,
}

_COUNTED = _TAKE.keys() - {"vm.state", "vm.timing", "accel.probe", "boot.profile"}
