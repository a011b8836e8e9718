"""What every event is: an attrs class with a dotted name and an instant, which can say what it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

__all__ = ["Event", "event_class"]

if TYPE_CHECKING:
    from attrs import frozen as event_class
else:

    def event_class(kind):
        """Make ``kind`` the attrs class of an event."""
        # Frozen for the type checker: to enforce it at run time would double what making an event costs.
        return attrs.define(kind, unsafe_hash=True)


@event_class
class Event:
    """Something that happened, ``t_ns`` nanoseconds after its VM's start. ``event`` is the class's dotted name."""

    event: ClassVar[str]

    t_ns: int

    def details(self) -> dict[str, object]:
        """What the line says beside the envelope: the fields, those that are None left out."""
        record: dict[str, object] = {}
        self.tell(record)
        return record

    def tell(self, record: dict[str, object]) -> None:
        """Add the details to ``record``."""
        kind = type(self)
        for name in _FIELDS.get(kind) or _field_names(kind):
            value = getattr(self, name)
            if value is not None:
                record[name] = value


_FIELDS: dict[type[Event], tuple[str, ...]] = {}


def _field_names(kind: type[Event]) -> tuple[str, ...]:
    names = _FIELDS[kind] = tuple(field.name for field in attrs.fields(kind) if field.name != "t_ns")
    return names
