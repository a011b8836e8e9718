"""The decision, against the rules stated once more: as a table that is walked from the top."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.events.types import GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.triggers import Facts, Fired, decide

small = st.integers(0, 5)


@st.composite
def policies(draw: st.DrawFn) -> SnapshotResources:
    listener, pre_exec = draw(st.booleans()), draw(st.booleans())
    beat, after = draw(st.none() | st.integers(1, 5)), draw(st.none() | small)
    if not listener and not pre_exec and beat is None and after is None:
        pre_exec = True
    return SnapshotResources(at_heartbeat=beat, after_ms=after, on_listener=listener, on_pre_exec=pre_exec)


facts_of = st.builds(
    Facts,
    heartbeat=st.none() | st.builds(GuestHeartbeat, small, st.integers(1, 6)),
    pre_exec=st.none() | st.builds(GuestPreExec, small),
    listener=st.none() | st.builds(GuestListener, small, st.just("tcp"), st.integers(1, 3)),
    idle=st.none() | st.builds(GuestIdle, small),
    elapsed_ms=st.floats(0, 6),
)


def stated(policy: SnapshotResources, facts: Facts) -> str | None:
    """The rules of the design, by name: each line is one, the first that holds counts."""
    beats = facts.heartbeat.counter if facts.heartbeat else 0
    rules = {
        "heartbeat": policy.at_heartbeat is not None and beats >= policy.at_heartbeat,
        "pre_exec": policy.on_pre_exec and facts.pre_exec is not None,
        "listener": policy.on_listener and not policy.on_pre_exec and facts.listener is not None,
        "parked": (policy.on_listener or policy.on_pre_exec) and facts.idle is not None,
        "after": policy.after_ms is not None and facts.elapsed_ms >= policy.after_ms,
    }
    return next((name for name, holds in rules.items() if holds), None)


@given(policies(), facts_of)
def test_the_first_rule_that_holds_decides(policy: SnapshotResources, facts: Facts) -> None:
    fired = decide(policy, facts)
    assert (fired.trigger if fired else None) == stated(policy, facts)


@given(policies(), facts_of)
def test_what_fired_says_when_the_guest_did_it(policy: SnapshotResources, facts: Facts) -> None:
    fired = decide(policy, facts)
    causes = {
        "heartbeat": facts.heartbeat,
        "pre_exec": facts.pre_exec,
        "listener": facts.listener,
        "parked": facts.idle,
    }
    if fired is not None:
        cause = causes.get(fired.trigger)
        assert fired.t_ns == (cause.t_ns if cause else None)
        assert fired.detail


@given(policies())
def test_nothing_fires_before_anything_happened_but_a_time_of_nought(policy: SnapshotResources) -> None:
    fired = decide(policy, Facts())
    assert fired == (Fired("after", "0 ms") if policy.after_ms == 0 else None)


@given(policies(), facts_of)
def test_with_a_guest_event_armed_an_idle_guest_is_never_waited_for(policy: SnapshotResources, facts: Facts) -> None:
    if (policy.on_listener or policy.on_pre_exec) and facts.idle is not None:
        assert decide(policy, facts) is not None


def test_the_detail_is_for_a_person() -> None:
    policy = SnapshotResources(on_listener=True, at_heartbeat=9)
    assert decide(policy, Facts(listener=GuestListener(4, "tcp6", 80))) == Fired("listener", "tcp6 port 80", 4)
    assert decide(policy, Facts(heartbeat=GuestHeartbeat(5, 9))) == Fired("heartbeat", "heartbeat 9", 5)
    assert decide(policy, Facts(idle=GuestIdle(6))) == Fired("parked", "no listener can come any more", 6)
    both = SnapshotResources(on_listener=True, on_pre_exec=True)
    assert decide(both, Facts(idle=GuestIdle(6))) == Fired("parked", "no pre-exec and listener can come any more", 6)
