"""Every event line that is made in a test's process, held against the schema once the test is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest
from jsonschema import Draft202012Validator, ValidationError

from asyncvmm.events import jsonl
from asyncvmm.events.encoding import to_line
from asyncvmm.events.schema import schema
from asyncvmm.events.types import Event

_REPORTED = 3


class LineValidator:
    """Says what the schema says, ten times as fast: the definition that a line must keep to is looked up by its name.

    The schema's ``allOf`` says the same by asking each name in turn; ``shortcut_for`` is what it must look like.
    """

    def __init__(self) -> None:
        whole = schema()
        Draft202012Validator.check_schema(whole)
        self.rules = whole.pop("allOf")
        self._envelope = Draft202012Validator(whole)
        self._details = {name: Draft202012Validator(part) for name, part in whole["$defs"].items()}

    @property
    def names(self) -> list[str]:
        """The events that it knows."""
        return list(self._details)

    def validate(self, record: object) -> None:
        """Raises ValidationError for a record that the schema refuses."""
        self._envelope.validate(record)
        assert isinstance(record, dict)
        self._details[record["event"]].validate(record)


def shortcut_for(name: str) -> object:
    """The rule of the schema that LineValidator stands for."""
    return {
        "if": {"properties": {"event": {"const": name}}, "required": ["event"]},
        "then": {"$ref": f"#/$defs/{name}"},
    }


VALIDATOR = LineValidator()


class Emitted:
    """The lines made since the last look. They are only kept, not looked at, while a loop may be running."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def to_line(self, event: Event, vm_id: str, epoch_ns: int) -> bytes:
        """encoding.to_line, noting the line."""
        line = to_line(event, vm_id, epoch_ns)
        self._lines.append(line)
        return line

    def problems(self) -> list[str]:
        """What is wrong with the lines since the last look, the first few."""
        lines, self._lines = self._lines, []
        found: list[str] = []
        for line in lines:
            problem = _problem_with(line)
            if problem is not None:
                found.append(f"{line!r}: {problem}")
                if len(found) == _REPORTED:
                    break
        return found


@contextmanager
def noted() -> Iterator[Emitted]:
    """Note every line that a JsonLines makes."""
    emitted = Emitted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "to_line", emitted.to_line)
        yield emitted


def _problem_with(line: bytes) -> str | None:
    if not line.endswith(b"\n") or line.count(b"\n") != 1:
        return "not one line"
    try:
        VALIDATOR.validate(orjson.loads(line))
    except (ValidationError, ValueError) as error:
        return str(error).splitlines()[0]
    return None
