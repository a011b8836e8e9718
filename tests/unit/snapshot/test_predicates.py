"""Predicates against plain logic over what has happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ConfigError
from asyncvmm.events.types import (
    GuestExit,
    GuestHeartbeat,
    GuestIdle,
    GuestListener,
    GuestPreExec,
    LogLost,
    SerialLine,
)
from asyncvmm.snapshot.predicate import (
    Activity,
    ConsoleOutput,
    Fact,
    Met,
    Never,
    PortWrite,
    Predicate,
    Tracker,
    Waiting,
)
from asyncvmm.snapshot.predicates import (
    MS_NS,
    after,
    console,
    heartbeat,
    idle,
    listener,
    port_write,
    pre_exec,
)
from asyncvmm.snapshot.search import PAUSE_NS

STEP_NS = PAUSE_NS

LEAVES: Sequence[tuple[Predicate, Callable[[Fact], bool], bool]] = [
    (console(b"ready"), lambda fact: isinstance(fact, ConsoleOutput) and b"ready" in fact.data, False),
    (port_write(0x7B), lambda fact: isinstance(fact, PortWrite) and fact.port == 0x7B, False),
    (port_write(0x7B, 2), lambda fact: fact == PortWrite(0x7B, 2), False),
    (heartbeat(3), lambda fact: isinstance(fact, GuestHeartbeat) and fact.counter >= 3, False),
    (pre_exec(), lambda fact: isinstance(fact, GuestPreExec), True),
    (listener(), lambda fact: isinstance(fact, GuestListener), True),
    (listener(80), lambda fact: isinstance(fact, GuestListener) and fact.port == 80, True),
]
"""Each simple one, which facts are it, and whether an idle guest cannot come to it any more."""

FACTS: list[Fact] = [
    ConsoleOutput(b"ready\n"),
    ConsoleOutput(b"not yet\n"),
    PortWrite(0x7B, 1),
    PortWrite(0x7B, 2),
    PortWrite(0x7C, 2),
    GuestHeartbeat(1, 2),
    GuestHeartbeat(2, 3),
    GuestPreExec(3),
    GuestListener(4, "tcp", 22),
    GuestListener(5, "tcp6", 80),
    GuestIdle(6),
    GuestExit(6, 0),
    LogLost(7, 1),
]

Told = dict[Predicate, bool | None]
"""Met, not yet, or None for never."""


def told(facts: Sequence[Fact]) -> Told:
    """What each simple one has come to, fact by fact."""
    states: Told = {leaf: False for leaf, _, _ in LEAVES}
    for fact in facts:
        for leaf, comes, ends_when_idle in LEAVES:
            if states[leaf] is False:
                lost = None if ends_when_idle and isinstance(fact, GuestIdle) else False
                states[leaf] = True if comes(fact) else lost
    return states


Logic = Callable[[Told], bool | None]


def either(one: Logic, other: Logic) -> Logic:
    def logic(states: Told) -> bool | None:
        values = (one(states), other(states))
        return True if True in values else None if values == (None, None) else False

    return logic


def both(one: Logic, other: Logic) -> Logic:
    def logic(states: Told) -> bool | None:
        values = (one(states), other(states))
        return None if None in values else values == (True, True)

    return logic


simple = st.sampled_from(LEAVES).map(lambda leaf: (leaf[0], lambda states, it=leaf[0]: states[it]))
expressions = st.recursive(
    simple,
    lambda inner: st.tuples(inner, inner, st.booleans()).map(
        lambda made: (
            (made[0][0] | made[1][0], either(made[0][1], made[1][1]))
            if made[2]
            else (made[0][0] & made[1][0], both(made[0][1], made[1][1]))
        )
    ),
    max_leaves=8,
)


@given(expressions, st.lists(st.sampled_from(FACTS), max_size=8))
def test_an_expression_is_the_logic_that_it_reads_as(
    expression: tuple[Predicate, Callable[[Told], bool | None]], facts: list[Fact]
) -> None:
    predicate, logic = expression
    tracker = predicate.start(0)
    for turn, fact in enumerate(facts):
        tracker.feed(fact, turn * STEP_NS)
        tracker.outcome(turn * STEP_NS)
    kinds = {True: Met, False: Waiting, None: Never}
    assert isinstance(tracker.outcome(len(facts) * STEP_NS), kinds[logic(told(facts))])


@given(expressions)
def test_an_expression_prints_as_python_reads_it(expression: tuple[Predicate, object]) -> None:
    text = str(expression[0])
    names: dict[str, Any] = {}
    for number, (leaf, _, _) in enumerate(LEAVES):
        # The longest first: "port 0x7b" is part of "0x2 at port 0x7b", and "listener" of "listener 80".
        names[f"leaf{number}"] = leaf
    for number, (leaf, _, _) in sorted(enumerate(LEAVES), key=lambda entry: -len(str(entry[1][0]))):
        text = text.replace(str(leaf), f"leaf{number}")
    assert eval(text, names) == expression[0]


def met_at(tracker: Tracker, now_ns: int) -> Met | None:
    outcome = tracker.outcome(now_ns)
    return outcome if isinstance(outcome, Met) else None


def test_the_first_alternative_in_order_tells_what_came() -> None:
    tracker = (heartbeat(1) | listener()).start(0)
    tracker.feed(GuestListener(5, "tcp", 80), 0)
    tracker.feed(GuestHeartbeat(9, 1), 0)
    assert met_at(tracker, 0) == Met("heartbeat 1", 9)


def test_several_together_came_when_the_last_did() -> None:
    tracker = (heartbeat(1) & listener()).start(0)
    tracker.feed(GuestListener(5, "tcp", 80), 0)
    tracker.feed(GuestHeartbeat(9, 1), 0)
    assert met_at(tracker, 0) == Met("heartbeat 1 and tcp port 80", 9)


def test_time_after_the_call() -> None:
    tracker = after(5).start(100)
    assert tracker.outcome(100) == Waiting(100 + 5 * MS_NS)
    assert met_at(tracker, 100 + 5 * MS_NS) == Met("5 ms")
    assert met_at(after(0).start(100), 100)


def test_the_nearest_time_of_several_is_when_to_look_again() -> None:
    assert (after(5) | after(3) | heartbeat(1)).start(0).outcome(0) == Waiting(3 * MS_NS)
    assert (after(5) & after(3) & heartbeat(1)).start(0).outcome(0) == Waiting(3 * MS_NS)
    assert (heartbeat(1) | pre_exec()).start(0).outcome(0) == Waiting(None)


def test_why_it_cannot_come_is_said() -> None:
    tracker = (pre_exec() | listener(80) & heartbeat(1)).start(0)
    tracker.feed(GuestIdle(1), 0)
    assert tracker.outcome(0) == Never("the workload has ended and nothing is left that could listen")


# -- idle --------------------------------------------------------------------------------------------------------------

QUIET_MS = 40


def idle_tracker() -> Tracker:
    tracker = idle(QUIET_MS / 1000).start(0)
    tracker.feed(Activity(7), 0)
    return tracker


def test_a_guest_without_signs_of_life_is_idle_after_its_time() -> None:
    tracker = idle_tracker()
    tracker.feed(Activity(7), (QUIET_MS - 1) * MS_NS)
    assert met_at(tracker, QUIET_MS * MS_NS - 1) is None
    assert met_at(tracker, QUIET_MS * MS_NS) == Met(f"idle for {QUIET_MS} ms")


@pytest.mark.parametrize(
    "life", [Activity(8), ConsoleOutput(b"x"), PortWrite(1, 1), GuestListener(1, "tcp", 80), GuestExit(1, 0)], ids=str
)
def test_each_sign_of_life_begins_it_anew(life: Fact) -> None:
    tracker = idle_tracker()
    tracker.feed(life, 30 * MS_NS)
    assert met_at(tracker, (30 + QUIET_MS) * MS_NS - 1) is None
    assert met_at(tracker, (30 + QUIET_MS) * MS_NS)


@pytest.mark.parametrize(
    "noise", [Activity(7), GuestHeartbeat(1, 1), LogLost(1, 1), SerialLine(1, "control", "x")], ids=str
)
def test_heartbeats_and_what_is_not_of_the_guest_are_none(noise: Fact) -> None:
    tracker = idle_tracker()
    tracker.feed(noise, 30 * MS_NS)
    assert met_at(tracker, QUIET_MS * MS_NS)


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=20))
def test_it_never_says_idle_too_early_and_looks_often_enough(turns: list[tuple[int, bool]]) -> None:
    """Activity is only seen by looking; looked at when asked, idleness is told a quarter of its time late at most."""
    tracker = idle_tracker()
    now = last_life = 0
    count, happenings = 7, []
    for gap, lives in turns:
        now += gap * MS_NS
        happenings.append((now, lives))
    now = 0
    while True:
        outcome = tracker.outcome(now)
        if isinstance(outcome, Met):
            assert now - last_life >= QUIET_MS * MS_NS
            assert now - last_life <= (QUIET_MS + QUIET_MS // 4 + 1) * MS_NS
            break
        assert isinstance(outcome, Waiting)
        assert outcome.until_ns is not None
        assert now < outcome.until_ns <= now + QUIET_MS * MS_NS
        due = [at for at, lives in happenings if now < at <= outcome.until_ns and lives]
        now, count = outcome.until_ns, count + len(due)
        last_life = max([last_life, *due])
        tracker.feed(Activity(count), now)


def test_idle_is_about_the_present_and_the_rest_about_what_happened() -> None:
    tracker = (idle(QUIET_MS / 1000) & heartbeat(1)).start(0)
    tracker.feed(Activity(7), 0)
    assert isinstance(tracker.outcome(50 * MS_NS), Waiting)
    tracker.feed(ConsoleOutput(b"busy again"), 50 * MS_NS)
    tracker.feed(GuestHeartbeat(1, 1), 60 * MS_NS)
    assert isinstance(tracker.outcome(60 * MS_NS), Waiting)
    assert met_at(tracker, 90 * MS_NS)


# -- wrong ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: console("ready"),  # type: ignore[arg-type]
        lambda: console(b"("),
        lambda: port_write(-1),
        lambda: port_write(0x10000),
        lambda: port_write(0x7B, 256),
        lambda: port_write(True),
        lambda: idle(0),
        lambda: idle(float("nan")),
        lambda: idle(float("inf")),
        lambda: idle(True),
        lambda: idle("1"),  # type: ignore[arg-type]
        lambda: heartbeat(0),
        lambda: listener(0),
        lambda: listener(65536),
        lambda: after(-1),
        lambda: after(0.5),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Predicate]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_or_and_and_are_not_taken_for_what_they_are_not() -> None:
    with pytest.raises(TypeError, match=r"\| and &"):
        _ = heartbeat(1) or listener()
    with pytest.raises(TypeError, match=r"\| and &"):
        _ = heartbeat(1) and listener()
    with pytest.raises(TypeError):
        _ = heartbeat(1) | 5  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = heartbeat(1) & None  # type: ignore[operator]


def test_who_waits_for_the_pre_exec_says_so() -> None:
    assert pre_exec().wants_pre_exec
    assert (after(5) | pre_exec() & idle(1)).wants_pre_exec
    assert not (after(5) | listener()).wants_pre_exec
