"""QMP as bytes in, messages out."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import MachineError
from asyncvmm.machine.qemu.qmp import (
    MAX_LINE,
    RUN_ID,
    QmpDecoder,
    QmpEvent,
    QmpGreeting,
    QmpMessage,
    QmpReply,
    encode_command,
    opening,
)

SESSION = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
    b'{"return": {}, "id": "negotiate"}\r\n'
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}\r\n'
    b'{"return": {}, "id": "run"}\r\n'
    b'{"id": 3, "error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}\r\n'
    b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\r\n'
)
MESSAGES: list[QmpMessage] = [
    QmpGreeting((7, 2, 22)),
    QmpReply("negotiate", {}),
    QmpEvent("RESUME", {}, 1_000_002_000),
    QmpReply(RUN_ID, {}),
    QmpReply(3, None, "The command x has not been found"),
    QmpEvent("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
]


def test_a_session_reads_as_its_messages() -> None:
    assert QmpDecoder().feed(SESSION) == MESSAGES


@given(st.lists(st.integers(1, 80), max_size=40))
def test_however_the_bytes_are_cut_the_messages_are_the_same(sizes: list[int]) -> None:
    decoder, rest, messages = QmpDecoder(), SESSION, list[QmpMessage]()
    for size in [*sizes, len(SESSION)]:
        messages += decoder.feed(rest[:size])
        rest = rest[size:]
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[]\n",
        b'["event"]\n',
        b"7\n",
        b'"event"\n',
        b'{"QMP": {}}\n',
        b'{"QMP": 1}\n',
        b'{"event": "X", "data": 3}\n',
        b'{"error": 3}\n',
        b"\xff\xfe\n",
        b'{"QMP": {"version": {"qemu": {"micro": [], "minor": 2, "major": 7}}}}\n',
    ],
)
def test_what_is_not_qmp_is_refused_with_what_was_found(line: bytes) -> None:
    with pytest.raises(MachineError, match="QMP message"):
        QmpDecoder().feed(line)


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_machine_error(data: bytes) -> None:
    with contextlib.suppress(MachineError):
        QmpDecoder().feed(data + b"\n")


def test_a_message_without_end_is_given_up() -> None:
    decoder = QmpDecoder()
    decoder.feed(b" " * MAX_LINE)
    with pytest.raises(MachineError, match="at most"):
        decoder.feed(b" ")


def test_a_message_of_an_unknown_kind_is_passed_over() -> None:
    assert QmpDecoder().feed(b'{"novelty": 1}\n\r\n') == []


@given(st.text(), st.integers(), st.dictionaries(st.text(), st.integers(-(2**53), 2**53)))
def test_a_command_is_one_line_of_json(name: str, id_: int, arguments: dict[str, Any]) -> None:
    id_ %= 2**53
    text = encode_command(name, id_, arguments)
    assert text.count(b"\n") == 1
    assert orjson.loads(text) == {"execute": name, "id": id_} | ({"arguments": arguments} if arguments else {})


def test_the_opening_turns_events_on_before_it_lets_the_guest_run() -> None:
    assert [orjson.loads(line)["execute"] for line in opening().splitlines()] == ["qmp_capabilities", "cont"]


def test_what_must_be_done_before_the_guest_runs_comes_in_between() -> None:
    lines = opening(encode_command("balloon", 1, {"value": 4096})).splitlines()
    assert [orjson.loads(line)["execute"] for line in lines] == ["qmp_capabilities", "balloon", "cont"]


@pytest.mark.parametrize(
    ("timestamp", "realtime_ns"),
    [
        (b"", None),
        (b', "timestamp": {"seconds": 1700000000, "microseconds": 123456}', 1_700_000_000_123_456_000),
        (b', "timestamp": {"seconds": -1, "microseconds": -1}', None),
    ],
    ids=["without", "with", "not known to QEMU"],
)
def test_an_event_says_when_it_happened_if_qemu_does(timestamp: bytes, realtime_ns: int | None) -> None:
    (event,) = QmpDecoder().feed(b'{"event": "RESUME"' + timestamp + b"}\n")
    assert event == QmpEvent("RESUME", {}, realtime_ns)
