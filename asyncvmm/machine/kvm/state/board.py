"""The board's state as a section of a snapshot: what its devices remember, and which interrupt lines are high.

Output that the loop has not taken and bytes that wait for the guest are part of it. The lines' levels are, because KVM
does not save who drives a line: they are raised again before the interrupt controllers get their state back, so that
no edge comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import attrs

from asyncvmm.devices.ged import GedState
from asyncvmm.devices.i8042 import I8042State
from asyncvmm.devices.rtc import RtcState
from asyncvmm.devices.serial_output import NEWLINE_CAP
from asyncvmm.devices.serial_state import SerialState
from asyncvmm.errors import ConfigError, SnapshotDamaged
from asyncvmm.machine.kvm.state.fields import Fields
from asyncvmm.snapshot.codec import encode
from asyncvmm.x86.layout import COM1_GSI, COM2_GSI

_LINES = (COM1_GSI, COM2_GSI)
_MOST_MARK = 1 << 62

_State = TypeVar("_State", SerialState, I8042State, RtcState, GedState)


@attrs.frozen(kw_only=True)
class BoardState:
    """A board that stands still. ``high``: GSIs of the lines that are raised. ``control_marks``: see Board; counted
    from the console's first untaken byte."""

    console: SerialState
    control: SerialState
    control_marks: Sequence[int]
    i8042: I8042State
    rtc: RtcState
    ged: GedState
    high: Sequence[int]

    @classmethod
    def of(cls, section: bytes) -> BoardState:
        """A section, checked. Raises SnapshotDamaged."""
        fields = Fields.of("board", section)
        state = cls(
            console=_device(fields, "console", SerialState),
            control=_device(fields, "control", SerialState),
            control_marks=tuple(fields.integers("control_marks", NEWLINE_CAP, _MOST_MARK)),
            i8042=_device(fields, "i8042", I8042State),
            rtc=_device(fields, "rtc", RtcState),
            ged=_device(fields, "ged", GedState),
            high=tuple(fields.integers("high", len(_LINES))),
        )
        newlines = min(state.control.output.count(b"\n"), NEWLINE_CAP)
        if len(state.control_marks) != newlines:
            raise fields.refuse("control_marks", f"{newlines}, one for each newline", len(state.control_marks))
        if not set(state.high) <= set(_LINES):
            raise fields.refuse("high", f"lines among {_LINES}", state.high)
        return state

    def encode(self) -> bytes:
        """The section."""
        return encode(attrs.asdict(self))


def _device(fields: Fields, name: str, kind: type[_State]) -> _State:
    inner = fields.fields(name)
    values: dict[str, Any] = {attribute.name: inner.value(attribute.name) for attribute in attrs.fields(kind)}
    try:
        return kind(**values)
    except ConfigError as error:
        raise SnapshotDamaged(f"board: {name}: {error.what}", expected=error.expected, found=error.found) from None
