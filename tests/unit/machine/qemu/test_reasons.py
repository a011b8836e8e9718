"""Why a guest on QEMU stopped."""

from __future__ import annotations

import pytest

from asyncvmm.machine.qemu.reasons import debug_exit_code, is_contention, reason_of_halt, reason_of_shutdown


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("guest-shutdown", "shutdown"),
        ("guest-reset", "reset"),
        ("guest-panic", "panic"),
        ("host-signal", "machine"),
        ("host-qmp-quit", "machine"),
        ("something new", "machine"),
        (None, "machine"),
    ],
)
def test_a_shutdown_event_says_whose_doing_it_was(said: str | None, reason: str) -> None:
    assert reason_of_shutdown({"reason": said}) == reason


@pytest.mark.parametrize(
    ("said", "reason"), [("internal-error", "emulation-failure"), ("running", None), ("paused", None), (None, None)]
)
def test_vcpus_that_stand_still_are_an_end_only_if_they_cannot_go_on(said: str | None, reason: str | None) -> None:
    assert reason_of_halt({"status": said}) == reason


def test_an_odd_status_without_a_word_is_the_debug_exit() -> None:
    assert debug_exit_code(85, "") == 42
    assert debug_exit_code(1, "") == 0


def test_a_failure_of_qemu_is_no_debug_exit() -> None:
    assert debug_exit_code(1, "qemu: no such device") is None
    assert debug_exit_code(0, "") is None
    assert debug_exit_code(-9, "") is None


@pytest.mark.parametrize(
    "words",
    [
        "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory",
        "ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy",
        "pthread_create failed: Resource temporarily unavailable",
    ],
)
def test_a_want_of_resources_is_worth_another_try(words: str) -> None:
    assert is_contention(1, words)


def test_a_kill_by_the_kernel_is_worth_another_try_and_a_wrong_option_is_not() -> None:
    assert is_contention(-9, "")
    assert not is_contention(1, "qemu-system-x86_64: -foo: invalid option")
