"""What a snapshot keeps of the guest as the host knows it: what it has said so far, and whether PID 1 waits for ``go``.

It is the section ``guest``, beside the machine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.events.lines import MAX_LINE
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.timing.profiles import GuestBootProfile

if TYPE_CHECKING:
    from asyncvmm.watch import GuestWatch

SECTION = "guest"

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


@attrs.frozen(kw_only=True)
class GuestRecord:
    """has_pid1: PID 1 is ours and listens on the control line. started: its workload was about to run, or ran.
    exited: it has ended. in_window: PID 1 holds the workload until it is told ``go``. stages: the boot stages it told
    of, by field of GuestBootProfile, in ns of its clock. console_line, control_line: what it has written of a line
    that has no end yet.

    Raises SnapshotDamaged for what no guest can have said.
    """

    has_pid1: bool = attrs.field(default=False, validator=_flag)
    started: bool = attrs.field(default=False, validator=_flag)
    exited: bool = attrs.field(default=False, validator=_flag)
    in_window: bool = attrs.field(default=False, validator=_flag)
    stages: Mapping[str, int] = attrs.field(factory=dict, validator=_stages)
    console_line: bytes = attrs.field(default=b"", validator=_line)
    control_line: bytes = attrs.field(default=b"", validator=_line)

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


def record_of(watch: GuestWatch, *, holds_workload: bool, exited: bool) -> GuestRecord:
    """The guest that ``watch`` follows. ``holds_workload``: PID 1 was told to hold it, and not yet to let go."""
    contract = watch.contract
    return GuestRecord(
        has_pid1=contract.ready_on_control,
        started=contract.started,
        exited=exited,
        in_window=contract.started and holds_workload,
        stages={name: ns for name, ns in contract.profile.to_dict().items() if name in _STAGES},
        console_line=watch.unfinished("console"),
        control_line=watch.unfinished("control"),
    )
