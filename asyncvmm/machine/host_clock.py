"""A sampled pair of the host's TSC and CLOCK_MONOTONIC: kvm/fastpath/clock.c through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from asyncvmm.timing.tsc import ClockSample

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
