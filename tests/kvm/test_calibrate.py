"""Measuring this machine's own KVM, and giving up on guests that do not do what a calibration guest does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asyncvmm.accel import SLOW_MIPS, choose_accel, forget_measurements, probe_kvm, probe_qemu
from asyncvmm.doctor import diagnose
from asyncvmm.errors import HostError, KvmUnavailable
from asyncvmm.machine.kvm import calibrate, calibration_guest
from asyncvmm.machine.kvm.calibrate import measure
from asyncvmm.machine.kvm.calibration_guest import EXITS, TICKS

if TYPE_CHECKING:
    from tests.kvm.conftest import Resources

Count = Callable[[], "Resources"]

ENDLESS_LOOP = bytes.fromhex("ebfe")  # jmp .
HALT = bytes.fromhex("f4")  # hlt
OTHER_PORT = bytes.fromhex("e680")  # out %al, $0x80
NO_STACK = bytes.fromhex("31e450")  # xor %esp, %esp; push %rax: page fault without an IDT


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    forget_measurements()
    yield
    forget_measurements()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvm-calibrate"]


def test_ring_0_speed_and_exit_cost_are_measured_and_nothing_is_left(resources: Count, nothing: Resources) -> None:
    result = measure()
    assert result.ring0_mips > 0
    assert result.exit_us > 0
    assert result.elapsed_ms * 1e3 > result.exit_us
    assert result.tsc_khz is None or result.tsc_khz > 100_000
    assert resources() == nothing
    assert threads() == []


def test_two_measurements_agree_on_the_order_of_magnitude() -> None:
    first, second = measure(), measure()
    assert 0.1 < first.ring0_mips / second.ring0_mips < 10


def test_a_busy_python_thread_does_not_make_the_guest_look_slower() -> None:
    quiet = measure()
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        busy = measure(limit_s=60)
    finally:
        ended.set()
        thread.join()
    assert busy.ring0_mips > quiet.ring0_mips / 10


def test_the_host_clock_serves_where_the_guest_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    by_tsc = measure()
    monkeypatch.setattr(calibration_guest.CalibrationGuest, "tsc_khz", lambda self: None)
    by_host = measure()
    assert by_host.tsc_khz is None
    assert 0.1 < by_host.ring0_mips / by_tsc.ring0_mips < 10


def test_a_guest_that_runs_forever_is_stopped_and_freed(resources: Count, nothing: Resources) -> None:
    with pytest.raises(KvmUnavailable, match=r"an end within 0\.05 s"):
        measure(program=ENDLESS_LOOP, limit_s=0.05)
    assert threads() == []
    assert resources() == nothing


@pytest.mark.parametrize(
    ("program", "found"),
    [(HALT, "HltExit"), (OTHER_PORT, "port=128"), (NO_STACK, "Exit")],
    ids=["halts", "uses another port", "faults"],
)
def test_a_guest_that_does_something_else_is_refused(
    program: bytes, found: str, resources: Count, nothing: Resources
) -> None:
    with pytest.raises(KvmUnavailable) as caught:
        measure(program=program)
    assert found in str(caught.value.found)
    assert resources() == nothing


def test_signals_to_the_process_do_not_disturb_a_measurement() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        assert measure(limit_s=60).ring0_mips > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard


def test_the_verdict_is_what_the_numbers_say() -> None:
    facts = probe_kvm()
    assert facts.usable
    assert facts.ring0_mips is not None
    assert facts.verdict == ("fast" if facts.ring0_mips >= SLOW_MIPS else "slow")


def test_a_process_measures_once() -> None:
    first = probe_kvm()
    assert probe_kvm() is first
    forget_measurements()
    assert probe_kvm() is not first


def test_vms_that_start_together_share_one_measurement() -> None:
    facts = []
    starters = [threading.Thread(target=lambda: facts.append(probe_kvm())) for _ in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert len({id(fact) for fact in facts}) == 1


@pytest.mark.anyio
async def test_auto_takes_kvm_where_it_is_fast_and_only_there() -> None:
    if not probe_qemu().usable and probe_kvm().verdict == "slow":
        with pytest.raises(HostError, match="KVM is slow"):
            await choose_accel("auto")
        return
    choice = await choose_accel("auto")
    assert choice.accel == ("kvm" if choice.kvm.verdict == "fast" else "qemu")
    assert choice.qemu_accel == ("kvm" if choice.kvm.verdict == "fast" else "tcg")


@pytest.mark.anyio
async def test_kvm_asked_for_by_name_is_taken_without_a_measurement() -> None:
    choice = await choose_accel("kvm")
    assert choice.accel == "kvm"
    assert choice.kvm.ring0_mips is None


def test_the_doctor_tells_the_same_numbers() -> None:
    facts, report = probe_kvm(), diagnose()
    assert report.kvm.ring0_mips == facts.ring0_mips
    assert report.kvm.verdict == facts.verdict
    assert report.kvm.api_version == 12
    assert all(report.kvm.capabilities.values())
    assert report.kvm.device.path == Path("/dev/kvm")


def _pass_of(
    loop_us: float, *, guest_us: float, exits_us: Sequence[float] = (10,) * EXITS, rounds: int = 1
) -> calibrate._Pass:
    """A pass whose loop took ``loop_us``, of which the guest's clock (1 GHz) saw ``guest_us``."""
    ticks = int(guest_us * 1000 / TICKS)
    return calibrate._Pass(rounds, ticks, int((loop_us + min(exits_us)) * 1000), [int(us * 1000) for us in exits_us])


def test_a_guest_s_clock_that_jumped_does_not_make_a_slow_kvm_look_fast() -> None:
    jumped = [_pass_of(6000, guest_us=guest_us) for guest_us in (100, 120, 6000)]
    assert calibrate._round_ns(jumped, 1_000_000) >= 5_900_000


def test_exits_that_took_long_do_not_shorten_the_loop() -> None:
    busy = [_pass_of(6000, guest_us=0, exits_us=[10, *[5900] * (EXITS - 1)]) for _ in range(3)]
    assert calibrate._round_ns(busy, 1_000_000) >= 5_900_000


def test_passes_of_different_lengths_are_compared_by_the_round() -> None:
    mixed = [_pass_of(6000 * rounds, guest_us=6000 * rounds, rounds=rounds) for rounds in (1, 20, 20)]
    assert calibrate._round_ns(mixed, 1_000_000) >= 5_900_000


def test_a_pass_is_long_enough_by_both_clocks_or_surely_by_the_host_s() -> None:
    assert not _pass_of(50, guest_us=5000).is_long_enough(1_000_000)
    assert not _pass_of(5000, guest_us=50).is_long_enough(1_000_000)
    assert _pass_of(5000, guest_us=5000).is_long_enough(1_000_000)
    assert _pass_of(60_000, guest_us=50).is_long_enough(1_000_000)


def test_a_host_that_is_delayed_does_not_make_a_fast_kvm_look_slow() -> None:
    delayed = [_pass_of(loop_us, guest_us=1000) for loop_us in (1100, 30_000, 90_000)]
    assert calibrate._round_ns(delayed, 1_000_000) < 1_200_000
