"""What a VM tells of its timeline: each phase once, profiles and text when the guest is ready, nothing to nobody."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import count

import pytest

from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import (
    BootProfileEvent,
    CreateVmProfileEvent,
    Event,
    PhaseEnded,
    VcpuSetupProfileEvent,
    VmTimingEvent,
)
from asyncvmm.report import BootReport
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.profiles import GuestBootProfile
from asyncvmm.timing.timeline import Timeline

EARLY = GuestBootProfile(init_entry_ns=5_000_000, ready_ns=7_000_000)
WHOLE = GuestBootProfile(init_entry_ns=5_000_000, ready_ns=7_000_000, command_loop_ns=8_000_000)
CLOCK = GuestClock(100, 10, "paired")


class Told:
    """A report on a timeline that ticks a nanosecond with each look, and all it published."""

    def __init__(self) -> None:
        hub = EventHub()
        self.timeline = Timeline(count().__next__)
        self.events: list[Event] = []
        self.report = BootReport(hub, self.timeline)
        hub.attach(self.events.append)

    def phases(self) -> list[tuple[str, int]]:
        return [(event.name, event.attempt) for event in self.events if isinstance(event, PhaseEnded)]

    def attempt(self, number: int, *names: str) -> None:
        self.report.begin_attempt(number)
        with self.timeline.phase("boot"):
            for name in names:
                with self.timeline.phase(name):
                    pass


@pytest.fixture
def told() -> Told:
    return Told()


def test_each_phase_is_told_once_as_it_has_ended(told: Told) -> None:
    with told.timeline.phase("total"):
        with told.timeline.phase("accel"):
            pass
        told.report.tell_phases()
        assert told.phases() == [("accel", 0)]
        told.report.tell_phases()
    told.report.tell_phases()
    assert told.phases() == [("accel", 0), ("total", 0)]


def test_a_failed_attempt_keeps_its_phases_and_the_timing_is_of_the_last(told: Told) -> None:
    told.attempt(0, "boot_wait", "boot_wait", "boot_wait")
    told.report.tell_phases()
    told.attempt(1, "boot_wait")
    told.report.tell_ready("qemu", WHOLE, CLOCK)
    assert told.phases() == [("boot_wait", 0)] * 3 + [("boot", 0), ("boot_wait", 1), ("boot", 1)]
    assert told.report.timing is not None
    assert told.report.timing.boot_retries == 1
    assert told.report.boot_profile(WHOLE).total == 2


def test_a_ready_guest_is_told_with_timing_and_profiles(told: Told) -> None:
    told.attempt(0, "cpuid_config", "boot_wait")
    timing = told.report.tell_ready("kvm", WHOLE, CLOCK)
    kinds = [type(event) for event in told.events if not isinstance(event, PhaseEnded)]
    assert kinds == [VmTimingEvent, BootProfileEvent, CreateVmProfileEvent, VcpuSetupProfileEvent]
    boot = next(event for event in told.events if isinstance(event, BootProfileEvent))
    assert boot.guest_clock == CLOCK
    assert boot.details()["guest"] == WHOLE.to_dict()
    assert told.report.timing == timing


def test_what_setting_up_vcpus_took_is_not_told_where_it_is_not_known(told: Told) -> None:
    told.attempt(0, "boot_wait")
    told.report.tell_ready("qemu", WHOLE, None)
    assert not any(isinstance(event, VcpuSetupProfileEvent) for event in told.events)


def test_the_last_stage_is_logged_once_whenever_it_comes(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    told.attempt(0, "boot_wait")
    with caplog.at_level(logging.INFO, "asyncvmm.boot"):
        told.report.tell_captured(EARLY)
        told.report.tell_ready("qemu", EARLY, None)
        assert "command_loop" not in caplog.text
        told.report.tell_captured(WHOLE)
        told.report.tell_captured(WHOLE)
    assert caplog.messages[0] == "[boot-profile] total: 2ns"
    assert caplog.messages[-1] == "[boot-profile][guest] command_loop     +     1ms (total 3ms)"
    assert len([line for line in caplog.messages if "command_loop" in line]) == 1


def test_a_boot_that_failed_or_goes_on_has_a_profile_of_what_there_is(told: Told) -> None:
    told.attempt(0, "kvm_open", "vm_create", "boot_wait")
    told.report.begin_attempt(1)
    with suppress(TimeoutError), told.timeline.phase("boot"):
        with told.timeline.phase("kvm_open"):
            pass
        under_way = told.report.boot_profile(EARLY)
        with told.timeline.phase("cpuid_config"):
            pass
        with told.timeline.phase("boot_wait"):
            raise TimeoutError
    assert (under_way.t_total_start, under_way.t_vm_create) == (None, None)
    profile, setup = told.report.boot_profile(EARLY), told.report.vcpu_setup_profile()
    assert profile.t_total_start is not None
    assert profile.t_kvm_open == under_way.t_kvm_open
    assert profile.t_boot_start is not None
    assert (profile.t_vm_create, profile.t_boot_ready, profile.total) == (None, None, None)
    assert profile.guest == EARLY
    assert told.report.create_vm_profile().boot_wait == 1
    assert setup is not None
    assert setup.cpuid_config == 1


def test_the_profile_of_a_boot_that_succeeded_stays_as_it_was(told: Told) -> None:
    told.attempt(0, "boot_wait")
    told.report.tell_ready("qemu", WHOLE, None)
    creation = told.report.create_vm_profile()
    with told.timeline.phase("boot_wait"):
        told.timeline.clock()
    assert told.report.create_vm_profile() == creation
    assert told.report.boot_profile(WHOLE).total == 2


def test_an_event_that_is_told_does_not_change_afterwards(told: Told) -> None:
    told.attempt(0, "boot_wait")
    told.report.tell_ready("qemu", EARLY, None)
    told.report.tell_captured(WHOLE)
    boot = next(event for event in told.events if isinstance(event, BootProfileEvent))
    assert boot.profile.guest == EARLY
    assert told.report.boot_profile(WHOLE).guest == WHOLE
