"""Facts: what the events of VMs add to metrics. Pure: a record in, counts and durations out.

Names that come from files and guests become label values, so their number is bounded: what asyncvmm itself says is
always let through, of anything else the first few, and the rest is called ``other``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

import attrs

from asyncvmm import errors
from asyncvmm.effects import StopReason
from asyncvmm.events.markers import STAGES
from asyncvmm.events.snapshot_types import Trigger
from asyncvmm.export.records import LARGEST_GUEST_NS, Record, counts, number, text
from asyncvmm.machine.kvm.exits import EXIT_NAMES

MAX_VMS = 4096
"""VMs that are remembered at a time; a VM comes back, forgotten, as one whose accelerator is unknown."""

MAX_STRANGERS = 32
"""Label values let through beside those that are expected, for each label."""

_NS = 1e-9
_RUNNING = ("ready", "paused")
_OUTCOMES = {"ready": "ready", "failed": "failed", "stopped": "cancelled"}
_RESTORE_OUTCOMES = {"paused": "restored", "ready": "restored", "failed": "failed", "stopped": "cancelled"}
_FINAL = ("stopped", "failed")
_LAST_STAGE = "command_loop"
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}", re.ASCII)

_ACCELS = ("kvm", "qemu", "unknown")
_KINDS = tuple(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.AsyncVMMError)
)
_REASONS = (*get_args(StopReason), "none", "timeout", "stalled")
_TRIGGERS = (*get_args(Trigger), "none")
_CANCELLED = "CancelledError"
_PHASES = """
    total accel setup machine_import plan overlay network_helper device_open device_fit device_attach
    kernel_asset_read rootfs_asset_open layout qemu_cmd_build
    boot kvm_open vm_create kvm_create_vm vm_arch_setup memory memory_alloc memory_register irqchip_create vcpu_create
    rootfs_load kernel_load boot_params vcpu_config cpuid_config register_config vm_finish vcpu_start
    qemu_fork qemu_qmp_connect boot_wait retry_pause
    snapshot_open memory_state_write vcpu_state_restore device_state_restore resume_kvm_run
"""


@attrs.frozen
class Count:
    """``amount`` more of a counter; ``labels`` are its label values."""

    metric: str
    labels: tuple[str, ...]
    amount: int = 1


@attrs.frozen
class Duration:
    """One observation of a histogram, in seconds."""

    metric: str
    labels: tuple[str, ...]
    seconds: float


Fact = Count | Duration

Operation = Literal["boot", "restore"]
"""How a VM comes to be."""


class Words:
    """The values of one label: those expected, and of others as many as there is room for."""

    def __init__(self, expected: Iterable[str], room: int = MAX_STRANGERS) -> None:
        self._known = set(expected)
        self._limit = len(self._known) + room

    def __call__(self, word: str) -> str:
        """``word`` if it may be a label value, else ``other``."""
        if word in self._known:
            return word
        if len(self._known) >= self._limit or not _WORD.fullmatch(word):
            return "other"
        self._known.add(word)
        return word


class Vocabulary:
    """The words of every label. One for each set of metrics."""

    def __init__(self) -> None:
        self.accel = Words(_ACCELS, 0)
        self.kind = Words(_KINDS, 0)
        self.trigger = Words(_TRIGGERS, 0)
        self.stage = Words(STAGES, 0)
        self.reason = Words(_REASONS)
        self.phase = Words(_PHASES.split())
        self.exit = Words(EXIT_NAMES.values())


class VmFacts:
    """What one VM's records say, one after the other. ``accel`` is its machine as far as it is known, ``operation`` how
    it came to be."""

    def __init__(self, vocabulary: Vocabulary, accel: str = "unknown", operation: Operation = "boot") -> None:
        self.accel = accel
        self.operation = operation
        self._words = vocabulary
        self._was_ready = self._booted = self._is_clone = self._was_mapped = False
        self._exits: dict[str, int] = {}
        self._stages: dict[str, int] = {}
        self._stages_counted: set[str] = set()

    def of(self, record: Record) -> list[Fact]:
        """The facts of a record, none for most. Raises NotARecord, with nothing changed, for one that is not right."""
        reader = _READERS.get(str(record.get("event")))
        return list(reader(self, record)) if reader else []

    def stages(self) -> Iterator[Fact]:
        """The guest's stages not yet counted, each as it was said last: none counts twice, however often it is said."""
        told, self._stages = self._stages, {}
        self._stages_counted |= told.keys()
        for stage, ns in told.items():
            yield Duration("guest_stage_seconds", (stage, self.accel), ns * _NS)

    def _probe(self, record: Record) -> Iterator[Fact]:
        self.accel = self._words.accel(text(record, "accel"))
        yield from ()

    def _state(self, record: Record) -> Iterator[Fact]:
        state, exits = text(record, "state"), counts(record, "exits")
        previous = record.get("previous")
        if record.get("snapshot") is not None:
            self._made_of_a_snapshot(record)
        outcomes = _OUTCOMES if self.operation == "boot" else _RESTORE_OUTCOMES
        done = previous in ("starting", "booting") and state in outcomes
        self._was_ready |= state in _RUNNING
        self._booted |= done
        if done and self.operation == "boot":
            yield Count("boots", (self.accel, "ready" if self._was_ready else _OUTCOMES[state]))
        elif done:
            yield from self._restored(_RESTORE_OUTCOMES[state])
        if done or state in _FINAL:
            yield from self.stages()
        yield from self._more_exits(exits)

    def _made_of_a_snapshot(self, record: Record) -> None:
        text(record, "snapshot")
        accel = self.accel if record.get("accel") is None else self._words.accel(text(record, "accel"))
        clone = None if record.get("clone") is None else number(record, "clone")
        self.operation, self.accel, self._is_clone = "restore", accel, clone is not None

    def _restored(self, outcome: str) -> Iterator[Fact]:
        if outcome == "cancelled" and self._was_mapped:
            outcome = "restored"  # a guest may be gone before the VM's state says so
        yield Count("restores", (self.accel, outcome))
        if self._is_clone:
            yield Count("clones", (self.accel, outcome))

    def _ready(self, record: Record) -> Iterator[Fact]:
        self._was_ready = True  # a guest may be gone before the VM's state says so
        yield from ()

    def _error(self, record: Record) -> Iterator[Fact]:
        kind, exits = self._words.kind(text(record, "kind")), counts(record, "exits")
        reason = self._words.reason(text(record, "reason")) if record.get("reason") is not None else "none"
        was_ready = self._was_ready or record.get("state") in _RUNNING
        yield Count("vm_failures" if was_ready else f"{self.operation}_failures", (self.accel, kind, reason))
        yield from self._more_exits(exits)

    def _phase(self, record: Record) -> Iterator[Fact]:
        ns, name = number(record, "duration_ns"), self._words.phase(text(record, "name"))
        if record.get("failed") is True:
            yield Count("phase_failures", (name, self.accel, self.operation))
        else:
            yield Duration("phase_duration_seconds", (name, self.accel, self.operation), ns * _NS)

    def _stage(self, record: Record) -> Iterator[Fact]:
        ns, stage = number(record, "guest_ns", LARGEST_GUEST_NS), self._words.stage(text(record, "stage"))
        if stage not in self._stages_counted:
            self._stages[stage] = ns
        if self._booted and stage == _LAST_STAGE:
            yield from self.stages()

    def _restore_stage(self, record: Record) -> Iterator[Fact]:
        ns, stage = number(record, "duration_ns"), text(record, "event").removeprefix("restore.")
        self.operation = "restore"  # older files say it here first
        self._was_mapped |= stage == "mapped"
        yield Duration("restore_stage_seconds", (stage, self.accel), ns * _NS)

    def _saved(self, record: Record) -> Iterator[Fact]:
        trigger, size = self._words.trigger(text(record, "trigger")), number(record, "allocated_bytes")
        pause, save = number(record, "pause_duration_ns"), number(record, "save_duration_ns")
        labels = (self.accel, "difference" if record.get("difference") is True else "full")
        yield Count("snapshots", (self.accel, "saved", trigger))
        yield Count("snapshot_bytes", labels, size)
        yield Duration("snapshot_pause_seconds", labels, pause * _NS)
        yield Duration("snapshot_save_seconds", labels, save * _NS)

    def _not_saved(self, record: Record) -> Iterator[Fact]:
        kind = text(record, "kind")
        trigger = "none" if record.get("trigger") is None else self._words.trigger(text(record, "trigger"))
        if kind == _CANCELLED:
            yield Count("snapshots", (self.accel, "cancelled", trigger))
        else:
            yield Count("snapshots", (self.accel, "failed", trigger))
            yield Count("snapshot_failures", (self.accel, self._words.kind(kind)))

    def _timing(self, record: Record) -> Iterator[Fact]:
        if "boot_retries" in record and (retries := number(record, "boot_retries")):
            yield Count("boot_retries", (self.accel,), retries)

    def _lost(self, record: Record) -> Iterator[Fact]:
        yield Count("events_lost", (), number(record, "lines"))

    def _more_exits(self, exits: Mapping[str, int]) -> Iterator[Fact]:
        # A VM's exits are told more than once, each time all there were so far: what came since is what counts.
        told: dict[str, int] = {}
        for reason, count in exits.items():
            word = self._words.exit(reason)
            told[word] = told.get(word, 0) + count
        for word, count in told.items():
            if count > (before := self._exits.get(word, 0)):
                self._exits[word] = count
                yield Count("exits", (word,), count - before)


_READERS: dict[str, Callable[[VmFacts, Record], Iterator[Fact]]] = {
    "accel.probe": VmFacts._probe,
    "vm.state": VmFacts._state,
    "guest.ready": VmFacts._ready,
    "vm.error": VmFacts._error,
    "phase": VmFacts._phase,
    "guest.boot_time": VmFacts._stage,
    "vm.timing": VmFacts._timing,
    "snapshot.saved": VmFacts._saved,
    "snapshot.failed": VmFacts._not_saved,
    "restore.mapped": VmFacts._restore_stage,
    "restore.first_exit": VmFacts._restore_stage,
    "restore.first_guest_event": VmFacts._restore_stage,
    "log.lost": VmFacts._lost,
}

EVENTS_READ = frozenset(_READERS)
"""The events that say anything for metrics."""


class Fold:
    """Records of many VMs, mixed as they come, told apart by their ``vm``. Bounded in memory."""

    def __init__(self, vocabulary: Vocabulary | None = None, max_vms: int = MAX_VMS) -> None:
        self._vocabulary = vocabulary or Vocabulary()
        self._max_vms = max_vms
        self._vms: OrderedDict[str, VmFacts] = OrderedDict()
        self._left: list[Fact] = []

    def of(self, record: Record) -> list[Fact]:
        """The facts of a record, none for most, and those that a forgotten VM left.

        Raises NotARecord for one that is not right.
        """
        name = text(record, "vm")
        if record.get("event") == "vm.state" and record.get("state") == "starting" and name in self._vms:
            self._left += self._vms.pop(name).stages()  # a name may be used again
        vm = self._vms.get(name)
        if vm is None:
            vm = self._vms[name] = VmFacts(self._vocabulary)
        self._vms.move_to_end(name)
        if len(self._vms) > self._max_vms:
            self._left += self._vms.popitem(last=False)[1].stages()
        facts = vm.of(record)
        left, self._left = self._left, []
        return left + facts
