"""What a snapshot keeps of the guest as the host knows it: what it has said so far, and whether PID 1 waits for ``go``.

It is the section ``guest``, beside the machine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import attrs

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.events.lines import MAX_LINE
from asyncvmm.events.types import Event, GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.timing.profiles import GuestBootProfile

if TYPE_CHECKING:
    from asyncvmm.events.hub import EventHub
    from asyncvmm.watch import GuestWatch

SECTION = "guest"

_MOST_FACTS = 64
_FACTS: Mapping[str, tuple[Callable[..., Event], Mapping[str, type]]] = {
    GuestPreExec.event: (GuestPreExec, {}),
    GuestHeartbeat.event: (GuestHeartbeat, {"counter": int}),
    GuestListener.event: (GuestListener, {"proto": str, "port": int}),
    GuestIdle.event: (GuestIdle, {}),
}

_STAGES = tuple(field.name for field in attrs.fields(GuestBootProfile))


def _flag(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise SnapshotDamaged(f"saved guest's {attribute.name}", expected="True or False", found=repr(value))


def _line(_: object, attribute: attrs.Attribute[bytes], value: object) -> None:
    if not isinstance(value, bytes) or len(value) > MAX_LINE:
        raise SnapshotDamaged(
            f"saved guest's {attribute.name}", expected=f"at most {MAX_LINE} bytes", found=repr(value)
        )


def _stages(_: object, __: object, value: object) -> None:
    if not isinstance(value, Mapping) or not all(
        name in _STAGES and isinstance(ns, int) and 0 <= ns < 1 << 64 for name, ns in value.items()
    ):
        raise SnapshotDamaged("saved guest's boot stages", expected="known stages with ns", found=repr(value)[:200])


def _facts(_: object, __: object, value: object) -> None:
    if not isinstance(value, tuple) or len(value) > _MOST_FACTS:
        raise SnapshotDamaged("saved guest's facts", expected=f"at most {_MOST_FACTS}", found=repr(value)[:200])
    for fact in value:
        if not isinstance(fact, Mapping) or not _is_fact(fact):
            raise SnapshotDamaged("saved guest's facts", expected="events of a guest", found=repr(fact)[:200])


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_fact(fact: Mapping[str, object]) -> bool:
    kinds = _FACTS.get(str(fact.get("event")))
    if kinds is None or set(fact) != {"event", *kinds[1]}:
        return False
    return all(type(fact[name]) is kind for name, kind in kinds[1].items())


@attrs.frozen(kw_only=True)
class GuestRecord:
    """has_pid1: PID 1 is ours and listens on the control line. answers_go: it is known to answer ``go``. started: its
    workload was about to run, or ran. exited: it has ended. in_window: PID 1 holds the workload until it is told
    ``go``. stages: the boot stages it told of, by field of GuestBootProfile, in ns of its clock. facts: what it had
    come to, as events without their time. console_line, control_line: what it has written of a line that has no end
    yet.

    Raises SnapshotDamaged for what no guest can have said.
    """

    has_pid1: bool = attrs.field(default=False, validator=_flag)
    answers_go: bool = attrs.field(default=False, validator=_flag)
    started: bool = attrs.field(default=False, validator=_flag)
    exited: bool = attrs.field(default=False, validator=_flag)
    in_window: bool = attrs.field(default=False, validator=_flag)
    stages: Mapping[str, int] = attrs.field(factory=dict, validator=_stages)
    facts: tuple[Mapping[str, object], ...] = attrs.field(default=(), converter=_tuple, validator=_facts)
    console_line: bytes = attrs.field(default=b"", validator=_line)
    control_line: bytes = attrs.field(default=b"", validator=_line)

    def past(self) -> list[Event]:
        """``facts`` as events, which came before the VM that is told of them began."""
        return [
            _FACTS[str(fact["event"])][0](0, **{name: fact[name] for name in fact if name != "event"})
            for fact in self.facts
        ]

    def to_section(self) -> bytes:
        """As a section's bytes."""
        return encode(attrs.asdict(self))

    @classmethod
    def of_section(cls, section: bytes) -> GuestRecord:
        """From a section's bytes. Raises SnapshotDamaged."""
        plain = decode(section)
        names = {field.name for field in attrs.fields(cls)}
        if not isinstance(plain, Mapping) or set(plain) != names:
            raise SnapshotDamaged("saved guest", expected=f"fields {sorted(names)}", found=repr(plain)[:200])
        return cls(**plain)


def record_of(watch: GuestWatch, events: EventHub, *, holds_workload: bool) -> GuestRecord:
    """The guest that ``watch`` follows, as ``events`` tell of it.

    ``holds_workload``: PID 1 was told to hold it, and not yet to let go.
    """
    contract = watch.contract
    return GuestRecord(
        has_pid1=contract.ready_on_control,
        answers_go=contract.answers_go,
        started=contract.started,
        exited=events.exit.done,
        facts=tuple(map(_fact, islice(events.past(), _MOST_FACTS))),
        in_window=contract.started and holds_workload,
        stages={name: ns for name, ns in contract.profile.to_dict().items() if name in _STAGES},
        console_line=watch.unfinished("console"),
        control_line=watch.unfinished("control"),
    )


def _fact(event: Event) -> dict[str, object]:
    return {"event": event.event, **{name: getattr(event, name) for name in _FACTS[event.event][1]}}
