from __future__ import annotations

import asyncio

import orjson
import pytest
from jsonschema import Draft202012Validator, ValidationError

from asyncvmm.events import jsonl
from asyncvmm.events.jsonl import JsonLines
from asyncvmm.events.schema import schema
from asyncvmm.events.types import Event, GuestBootTime, GuestListener, LogLost
from tests.support.lines import VALIDATOR, Emitted, noted, shortcut_for

GOOD = {"v": 1, "ts": "2026-11-21T02:25:33.123456Z", "t_ns": 5, "vm": "a1b2", "event": "guest.exit", "code": 3}


def test_the_validator_leaves_out_no_rule_of_the_schema() -> None:
    assert VALIDATOR.rules == [shortcut_for(name) for name in VALIDATOR.names]


@pytest.mark.parametrize(
    "wrong",
    [{}, {"code": 256}, {"code": None}, {"v": 2}, {"event": "guest.exits"}, {"event": "log.lost"}, {"ts": "now"}],
)
def test_it_and_the_schema_agree(wrong: dict[str, object]) -> None:
    record = {**GOOD, **wrong}
    assert Draft202012Validator(schema()).is_valid(record) == (not wrong)
    if wrong:
        with pytest.raises(ValidationError):
            VALIDATOR.validate(record)
    else:
        VALIDATOR.validate(record)


def stream(*events: Event) -> Emitted:
    async def write() -> None:
        sink = JsonLines(lambda data: None, "a1b2", 0)
        for event in events:
            sink.publish(event)
        await sink.aclose()

    with noted() as emitted:
        asyncio.run(write())
    return emitted


def test_a_line_that_breaks_the_schema_is_noticed_once() -> None:
    emitted = stream(GuestBootTime(1, "ready", 5), GuestListener(2, "tcp", 70_000), LogLost(3, 1))
    (problem,) = emitted.problems()
    assert orjson.dumps("guest.listener").decode() in problem
    assert "70000 is greater than the maximum of 65535" in problem
    assert emitted.problems() == []


def test_lines_are_noted_in_every_test(emitted: Emitted) -> None:
    assert vars(jsonl)["to_line"] == emitted.to_line
