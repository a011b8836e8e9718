"""Measuring KVM: how fast ring-0 code runs in a guest, and what one exit costs.

/dev/kvm being there says little: nested inside another hypervisor, KVM may emulate a guest kernel instruction by
instruction. A tiny guest times ring-0 loops, each longer than the last until one takes long enough to be measured;
OUTs back to back give the cost of an exit.

All of it happens on a thread of its own with a time limit: a KVM that never comes back costs that limit, no more.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import attrs

from asyncvmm.errors import AsyncVMMError, KvmUnavailable
from asyncvmm.machine.kvm.calibration_guest import (
    ASK,
    EXITS,
    INSTRUCTIONS_PER_ROUND,
    MARK,
    REPORT,
    TICKS,
    CalibrationGuest,
    Interrupted,
)
from asyncvmm.machine.kvm.fds import DEV_KVM
from asyncvmm.machine.threads import start_thread

LIMIT_S = 2.0
"""Longest a measurement may take before its guest is stopped; it takes some tens of milliseconds."""

GRACE_S = 1.0
"""How long a stopped guest may take to come back before it is left behind."""

_FIRST_ROUNDS = 250
"""Some milliseconds where every instruction is emulated, half a microsecond on a processor."""
_GROWTH = 20
_MOST_ROUNDS = _FIRST_ROUNDS * _GROWTH**3
_LONG_ENOUGH_NS = 1_000_000
_SURELY_LONG_NS = 50_000_000
"""By the host's clock: longer than a busy host delays what takes microseconds."""
_SAMPLES = 3


@attrs.frozen
class KvmMeasurement:
    """What a KVM was found to do.

    ring0_mips: million ring-0 instructions a second. exit_us: microseconds from one OUT to the next, with what this
    process does in between. tsc_khz: the TSC's frequency, None where KVM does not know it. elapsed_ms: what measuring
    took, creating and freeing the VM included.
    """

    ring0_mips: float
    exit_us: float
    tsc_khz: int | None = None
    elapsed_ms: float = 0.0


def measure(path: Path = DEV_KVM, *, limit_s: float = LIMIT_S, program: bytes | None = None) -> KvmMeasurement:
    """Run the calibration guest, or ``program`` in its place. Blocks: some tens of milliseconds, for ``limit_s`` and
    GRACE_S together at the very most.

    Raises KvmUnavailable (not to be opened, or the guest did not do what it should), KvmIoctlError, HostError
    where no thread is to be had.
    """
    begin = time.monotonic_ns()
    calibration = _Calibration(path, program or _program())
    # A daemon: a call into a broken KVM that never returns must not keep this process from ending.
    thread = threading.Thread(target=calibration.main, name="kvm-calibrate", daemon=True)
    start_thread(thread)
    thread.join(limit_s)
    if thread.is_alive():
        calibration.stop()
        thread.join(GRACE_S)
    measured = calibration.result(limit_s)
    return attrs.evolve(measured, elapsed_ms=(time.monotonic_ns() - begin) / 1e6)


def _program() -> bytes:
    return files("asyncvmm.guest").joinpath("calibrate.bin").read_bytes()


class _Calibration:
    """One measurement: ``main`` on a thread of its own, the rest on the thread that waits for it."""

    def __init__(self, path: Path, program: bytes) -> None:
        self._path = path
        self._program = program
        self._lock = threading.Lock()
        self._stopped = False
        self._guest: CalibrationGuest | None = None
        self._measured: KvmMeasurement | None = None
        self._error: AsyncVMMError | None = None

    def main(self) -> None:
        """Create the VM, measure, free it; leave a result or an error."""
        try:
            with closing(CalibrationGuest(self._path, self._program)) as guest:
                if self._may_run(guest):
                    self._measured = _measure(guest)
        except Interrupted:
            return
        except AsyncVMMError as error:
            self._error = error
        except Exception as error:
            self._error = KvmUnavailable("KVM", expected="to be measured", found=f"{type(error).__name__}: {error}")

    def _may_run(self, guest: CalibrationGuest) -> bool:
        with self._lock:
            self._guest = guest
            return not self._stopped

    def stop(self) -> None:
        """Make the guest stop, or never start."""
        with self._lock:
            self._stopped = True
            if self._guest is not None:
                self._guest.kick()

    def result(self, limit_s: float) -> KvmMeasurement:
        """What was measured. Raises what went wrong."""
        if self._error is not None:
            raise self._error
        if self._measured is None:
            raise KvmUnavailable("KVM running a tiny guest", expected=f"an end within {limit_s} s", found="none")
        return self._measured


def _measure(guest: CalibrationGuest) -> KvmMeasurement:
    rounds, samples, exits = _FIRST_ROUNDS, list[_Pass](), list[int]()
    tsc_khz = guest.tsc_khz()
    while len(samples) < _SAMPLES:
        sample = _pass(guest, rounds)
        exits += sample.exits_ns
        if sample.is_long_enough(tsc_khz) or rounds >= _MOST_ROUNDS:
            samples.append(sample)
        else:
            rounds *= _GROWTH
    # Of the exits the cheapest, the one that other work in this process (the GIL) or on this host disturbed least.
    return KvmMeasurement(
        ring0_mips=INSTRUCTIONS_PER_ROUND * 1e3 / _round_ns(samples, tsc_khz),
        exit_us=min(exits) / 1e3,
        tsc_khz=tsc_khz,
    )


def _round_ns(samples: Sequence[_Pass], tsc_khz: int | None) -> float:
    """How long a round takes, by two clocks that are wrong in different ways.

    The host's shows what delays the host as well: the least of it counts. The guest's may jump when its thread changes
    processors, where their counters stand apart: its middle one counts. Of both the slower one: a KVM that is taken for
    fast and is not cannot boot a kernel, one that is a few times faster than it was taken for still counts as fast.
    """
    by_guest = statistics.median(sample.loop_ns(tsc_khz) / sample.rounds for sample in samples)
    by_host = min(sample.host_loop_ns / sample.rounds for sample in samples)
    return max(by_guest, by_host)


@attrs.frozen
class _Pass:
    """One pass of the guest: ``ticks`` of its TSC (in units of TICKS) and host nanoseconds for the loop of ``rounds``,
    the loop's exit included; then host nanoseconds for each exit."""

    rounds: int
    ticks: int
    host_ns: int
    exits_ns: list[int]

    def loop_ns(self, tsc_khz: int | None) -> float:
        """How long the loop took. Where the guest's clock says nothing, the host's does."""
        if tsc_khz and self.ticks:
            return self.ticks * TICKS * 1e6 / tsc_khz
        return self.host_loop_ns

    @property
    def host_loop_ns(self) -> float:
        """How long it took by the host's clock, without the exit: the cheapest, for a busy host makes others dear."""
        return max(self.host_ns - min(self.exits_ns), 1.0)

    def is_long_enough(self, tsc_khz: int | None) -> bool:
        """Whether it took long enough to be measured, by either clock as far as it can be trusted."""
        by_both = min(self.loop_ns(tsc_khz), self.host_loop_ns)
        return by_both >= _LONG_ENOUGH_NS or self.host_loop_ns >= _SURELY_LONG_NS


def _pass(guest: CalibrationGuest, rounds: int) -> _Pass:
    guest.run_to(ASK)
    guest.answer(rounds)
    marks = [time.monotonic_ns()]
    guest.run_to(REPORT)
    marks.append(time.monotonic_ns())
    ticks = guest.written()
    for _ in range(EXITS):
        guest.run_to(MARK)
        marks.append(time.monotonic_ns())
    took = [later - earlier for earlier, later in pairwise(marks)]
    return _Pass(rounds, ticks, took[0], took[1:])
