"""A boot's steps, and the text that the log gets."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.boot_log import log_boot, log_command_loop
from asyncvmm.timing.boot_profile import BootProfile, duration_text, share_text
from asyncvmm.timing.profiles import GuestBootProfile

GUEST = GuestBootProfile(
    init_entry_ns=31_000_000,
    mounts_done_ns=31_250_000,
    uart_access_done_ns=31_250_400,
    init_ok_ns=33_000_000,
    ready_ns=33_000_000,
    command_loop_ns=40_000_000,
)


def booted(guest: GuestBootProfile = GUEST) -> BootProfile:
    profile = BootProfile(
        t_total_start=1_000_000,
        t_kvm_open=1_010_000,
        t_vm_create=1_210_000,
        t_memory_setup=1_400_000,
        t_boot_start=3_000_000,
        memory_alloc_duration=20_000,
        memory_register_duration=170_000,
        kernel_load_duration=900_000,
        rootfs_load_duration=300,
        vcpu_create_duration=80_000,
        vcpu_config_duration=20_000,
        boot_params_duration=0,
        guest=guest,
    )
    profile.mark_boot_ready(13_000_000)
    return profile


def test_ready_ends_wait_and_total_at_one_instant() -> None:
    profile = booted()
    assert profile.t_boot_ready == profile.t_total_end == 13_000_000
    assert profile.total == 12_000_000
    assert profile.steps()["boot_wait"] == 10_000_000


def test_the_steps_and_what_they_leave_make_up_the_total() -> None:
    steps = booted().steps()
    assert sum(step or 0 for step in steps.values()) == 12_000_000
    assert steps["host_misc"] == 599_700


def test_the_remainder_is_never_negative() -> None:
    profile = booted()
    profile.kernel_load_duration = 1 << 40
    assert profile.steps()["host_misc"] == 0


def test_the_text_names_each_step_with_its_share() -> None:
    assert booted().host_lines() == [
        "[boot-profile] total: 12ms",
        "[boot-profile] kvm_open:        10us (0.1%)",
        "[boot-profile] vm_create:      200us (1.7%)",
        "[boot-profile] memory:         190us (1.6%)",
        "[boot-profile] kernel_load:    900us (7.5%)",
        "[boot-profile] rootfs_load:    300ns (0.0%)",
        "[boot-profile] boot_params:      0ns (0.0%)",
        "[boot-profile] vcpu_setup:     100us (0.8%)",
        "[boot-profile] boot_wait:       10ms (83.3%)",
        "[boot-profile] host_misc:      599us (5.0%)",
    ]


def test_a_remainder_of_nothing_is_not_shown() -> None:
    profile = BootProfile(t_total_start=0, t_boot_start=0)
    profile.mark_boot_ready(0)
    assert profile.host_lines() == ["[boot-profile] total: 0ns", "[boot-profile] boot_wait:        0ns (0.0%)"]


def test_the_guest_s_stages_show_their_distance() -> None:
    assert booted().guest_lines() == [
        "[boot-profile][guest] init_entry       +     0ns (total 0ns)",
        "[boot-profile][guest] mounts_done      +   250us (total 250us)",
        "[boot-profile][guest] uart_access      +   400ns (total 250us)",
        "[boot-profile][guest] init_ok          +     1ms (total 2ms)",
        "[boot-profile][guest] ready            +     0ns (total 2ms)",
    ]
    assert booted().command_loop_line() == "[boot-profile][guest] command_loop     +     7ms (total 9ms)"


def test_a_guest_that_says_little_or_goes_back_in_time_is_shown_as_it_is() -> None:
    assert booted(GuestBootProfile()).guest_lines() == []
    assert booted(GuestBootProfile()).command_loop_line() is None
    backwards = GuestBootProfile(init_entry_ns=9, ready_ns=4, command_loop_ns=2)
    assert booted(backwards).guest_lines()[1] == "[boot-profile][guest] ready            +     0ns (total 0ns)"
    assert booted(backwards).command_loop_line() == "[boot-profile][guest] command_loop     +     0ns (total 0ns)"


def test_a_dict_has_the_guest_beside_the_fields_and_totals() -> None:
    values = booted().to_dict()
    assert values["guest"] == GUEST.to_dict()
    assert values["total"] == 12_000_000
    assert values["capture_guest_boot_lines"] is True
    assert "t_vcpu_setup" not in values


@given(st.integers(0, 1 << 63))
def test_a_duration_is_whole_in_the_largest_unit_in_which_it_is_not_zero(ns: int) -> None:
    text = duration_text(ns)
    size = {"ms": 10**6, "us": 10**3, "ns": 1}[text[-2:]]
    assert int(text[:-2]) == ns // size
    assert ns < 1000 * size or size == 10**6
    assert int(text[:-2]) or ns == 0


def test_a_share_of_nothing_is_nothing() -> None:
    assert share_text(5, 0) == "0.0%"
    assert share_text(1, 3) == "33.3%"


def test_a_boot_is_logged_once_and_its_last_stage_once(caplog: pytest.LogCaptureFixture) -> None:
    profile = booted()
    with caplog.at_level(logging.INFO, "asyncvmm.boot"):
        log_command_loop(profile)
        for _ in range(2):
            log_boot(profile)
        for _ in range(2):
            log_command_loop(profile)
    assert caplog.messages == [*profile.host_lines(), *profile.guest_lines(), profile.command_loop_line()]
    assert profile.host_logged
    assert profile.guest_extension_logged


def test_what_nobody_wants_to_read_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "asyncvmm.boot"):
        log_boot(booted())
    assert caplog.messages == []
