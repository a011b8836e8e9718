"""The host's clocks beside each other: its TSC and CLOCK_MONOTONIC (kvm/fastpath/clock.c through ctypes), and
CLOCK_REALTIME. A thread may lose its processor between any two looks, for long where there are many VMs.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from asyncvmm.timing.tsc import ClockSample

LOOKS = 16
"""Most looks at a pair of clocks."""
TIGHT_NS = 5_000
"""A look that took no longer is good enough."""

_LIBRARY = Path(__file__).with_name("kvm") / "fastpath" / "fastpath.so"


class _Sample(ctypes.Structure):
    """struct clock_sample."""

    _fields_ = [("tsc", ctypes.c_uint64), ("ns", ctypes.c_uint64), ("tsc_end", ctypes.c_uint64)]


@cache
def _library() -> ctypes.PyDLL | None:
    try:
        library = ctypes.PyDLL(str(_LIBRARY))
        library.clock_take_sample.argtypes = (ctypes.POINTER(_Sample),)
        library.clock_take_sample.restype = None
    except (OSError, AttributeError):
        return None
    return library


def clock_sample() -> ClockSample | None:
    """The present pair, the tightest of several; None where the native library cannot be loaded."""
    library = _library()
    if library is None:
        return None
    sample = _Sample()
    library.clock_take_sample(ctypes.byref(sample))
    return ClockSample(sample.tsc, sample.ns, sample.tsc_end)


def realtime_ahead_ns(
    monotonic: Callable[[], int] = time.monotonic_ns, realtime: Callable[[], int] = time.time_ns
) -> int:
    """What CLOCK_REALTIME is ahead of CLOCK_MONOTONIC, in ns, by the tightest of several looks."""
    ahead, tightest = 0, None
    for _ in range(LOOKS):
        begin, between = monotonic(), realtime()
        took = monotonic() - begin
        if tightest is None or took < tightest:
            ahead, tightest = between - begin - took // 2, took
        if took <= TIGHT_NS:
            break
    return ahead
