"""Fields of an event line that a stranger may have written: taken only if they are of the right type and in range."""

from __future__ import annotations

from collections.abc import Mapping

from asyncvmm.timing.text import printable

MAX_INT = (1 << 63) - 1
"""The largest number of nanoseconds taken: 292 years."""

MAX_GUEST_NS = (1 << 64) - 1
"""The largest value of a guest's clock (design of BOOT_TIME)."""

MAX_ENTRIES = 256
"""Entries of a nested object that are taken."""

MAX_TEXT = 1024
"""Characters of a text that are taken."""

_SHOWN = 40


class BadField(Exception):
    """A field is missing, of another type, or out of range. ``str`` says which, what was expected and what is there."""

    def __init__(self, name: str, expected: str, found: object) -> None:
        super().__init__(f"{printable(name)}: expected {expected}, found {_shown(found)}")


def whole(fields: Mapping[str, object], name: str, *, least: int = 0, most: int = MAX_INT) -> int:
    """The integer ``name``. Raises BadField."""
    value = fields.get(name)
    if type(value) is int and least <= value <= most:
        return value
    kind = "an integer from 0" if least == 0 else "an integer"
    raise BadField(name, f"{kind} to {most}", value)


def maybe_whole(fields: Mapping[str, object], name: str) -> int | None:
    """The integer ``name``, None if there is none. Raises BadField."""
    return None if fields.get(name) is None else whole(fields, name)


def text(fields: Mapping[str, object], name: str) -> str:
    """The text ``name``, its first MAX_TEXT characters. Raises BadField."""
    value = fields.get(name)
    if isinstance(value, str):
        return value[:MAX_TEXT]
    raise BadField(name, "text", value)


def maybe_text(fields: Mapping[str, object], name: str) -> str | None:
    """The text ``name``, None if there is none. Raises BadField."""
    return None if fields.get(name) is None else text(fields, name)


def flag(fields: Mapping[str, object], name: str) -> bool:
    """The truth value ``name``, False if there is none. Raises BadField."""
    value = fields.get(name, False)
    if isinstance(value, bool):
        return value
    raise BadField(name, "true or false", value)


def mapping(fields: Mapping[str, object], name: str) -> Mapping[str, object]:
    """The object ``name``, empty if there is none. Raises BadField."""
    value = fields.get(name)
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    raise BadField(name, "an object", value)


def numbers(fields: Mapping[str, object], most: int = MAX_INT) -> dict[str, int]:
    """The fields that are integers from 0 to ``most``, at most MAX_ENTRIES of them; others are no numbers of ours."""
    found = {name: value for name, value in fields.items() if type(value) is int and 0 <= value <= most}
    return dict(list(found.items())[:MAX_ENTRIES])


def _shown(found: object) -> str:
    if found is None:
        return "none"
    if isinstance(found, dict):
        return "an object"
    if isinstance(found, list):
        return "a list"
    if isinstance(found, bool):
        return str(found).lower()
    return printable(repr(found) if isinstance(found, str) else str(found), _SHOWN)
