"""``fastpath.so`` through ctypes. The library ships prebuilt; ``fastpath.c`` beside it says what it does and why.

Where it cannot be loaded (another architecture, a mount without exec) ``load`` gives None and vCPUs run without it:
slower, the same in every other respect.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int64,
    c_long,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("fastpath.so")

PORTS = 4
RING_BYTES = 65536
MOST_NEWLINES = 2048

STEP_BYTES = 72
"""Size of struct step in chain.c."""

OFF, CONSTANT_READ, POSTED_WRITE = 0, 1, 2


class FastPort(Structure):
    """struct port."""

    _fields_ = [
        ("key", c_uint32),
        ("kind", c_uint32),
        ("value", c_uint32),
        ("unused", c_uint32),
        ("count", c_uint64),
        ("cycles", c_uint64),
        ("max_cycles", c_uint64),
    ]


class FastpathData(Structure):
    """struct fastpath: shared by all vCPU threads of a VM, and the loop."""

    _fields_ = [
        ("lock", c_uint32),
        ("used", c_uint32),
        ("newlines", c_uint32),
        ("announced", c_uint32),
        ("urgent", c_uint32),
        ("event_fd", c_int),
        ("port", FastPort * PORTS),
        ("newline_ns", c_uint64 * MOST_NEWLINES),
        ("ring", c_uint8 * RING_BYTES),
    ]


class Order(Structure):
    """struct order of runner.c."""

    _fields_ = [
        ("steps", c_uint64),
        ("slots", c_uint64),
        ("count", c_uint32),
        ("given", c_uint32),
        ("vcpu", c_uint32),
        ("clock", c_uint32),
        ("bell", c_int),
        ("unused", c_uint32),
    ]


class Errand(Structure):
    """struct errand of runner.c."""

    _fields_ = [
        ("state", c_uint32),
        ("gate", c_uint32),
        ("order", Order),
        ("mask", c_uint64),
        ("cpu", c_uint32),
        ("done", c_uint32),
        ("entered", c_uint32),
        ("sender", c_uint32),
        ("result", c_int64),
        ("entered_ns", c_uint64),
        ("left_ns", c_uint64),
        ("faults", c_uint64 * 2),
        ("left_faults", c_uint64 * 2),
    ]


class Library:
    """The library's functions. ``run``, ``chain`` and ``wait`` release the GIL, the others keep it: they take a
    microsecond at the most, ``send`` and ``decide`` some when they wake a thread."""

    def __init__(self) -> None:
        released, kept = ctypes.CDLL(str(LIBRARY)), ctypes.PyDLL(str(LIBRARY))
        self.run = released.fastpath_run
        self.run.argtypes, self.run.restype = (c_int, c_void_p, c_void_p), c_long
        self.chain: Callable[[bytes, int, int, int], int] = released.chain_run
        released.chain_run.argtypes, released.chain_run.restype = (c_char_p, c_uint32, c_void_p, c_uint32), c_uint32
        self.set = kept.fastpath_set
        self.set.argtypes, self.set.restype = (POINTER(FastpathData), c_int, c_uint32, c_uint32, c_uint32), None
        self.take = kept.fastpath_take
        self.take.argtypes, self.take.restype = (POINTER(FastpathData), c_void_p, c_void_p, POINTER(c_uint32)), c_uint32
        self.wait: Callable[[int], int] = released.runner_wait
        released.runner_wait.argtypes, released.runner_wait.restype = (c_void_p,), c_uint32
        self.decide: Callable[[int, int], None] = kept.runner_decide
        kept.runner_decide.argtypes, kept.runner_decide.restype = (c_void_p, c_uint32), None
        self.send: Callable[[int, int, int, int], None] = kept.runner_send
        kept.runner_send.argtypes, kept.runner_send.restype = (c_void_p, c_void_p, c_uint32, c_uint32), None
        self.bell: Callable[[], int] = kept.runner_bell
        kept.runner_bell.argtypes, kept.runner_bell.restype = (), c_int
        self.is_here: Callable[[int], int] = kept.runner_is_here
        kept.runner_is_here.argtypes, kept.runner_is_here.restype = (c_void_p,), c_uint32
        sizes = (kept.fastpath_size(), kept.chain_step_size(), kept.runner_size())
        if sizes != (sizeof(FastpathData), STEP_BYTES, sizeof(Errand)):
            raise OSError("fastpath.so was built from other sources")


@cache
def load() -> Library | None:
    """The library, loaded once a process; None where it cannot be."""
    try:
        return Library()
    except (OSError, AttributeError):  # AttributeError: it lacks a function
        return None


class _Taken:
    """What is taken out of a ring, on its way into Python's own objects: one for all VMs of the process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bytes = (c_uint8 * RING_BYTES)()
        self.newlines = (c_uint64 * MOST_NEWLINES)()
        self.count = c_uint32()


_taken = _Taken()


class Fastpath:
    """One VM's posted port accesses. ``address`` is what the run loop takes."""

    def __init__(self, library: Library, event_fd: int) -> None:
        self._library = library
        self.run = library.run
        # Not from the heap: a VM that posts little has only a page or two of it.
        pages = mmap.mmap(-1, sizeof(FastpathData), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = FastpathData.from_buffer(pages)
        self.data.event_fd = event_fd
        self.address = ctypes.addressof(self.data)

    def set(self, slot: int, key: int, kind: int, value: int = 0) -> None:
        """Answer the accesses named ``key`` (exits.io_key) as ``kind`` says, from now on."""
        self._library.set(byref(self.data), slot, key, kind, value)

    def take(self) -> tuple[bytes, list[int]]:
        """The bytes posted since the last call, and CLOCK_MONOTONIC ns of each newline in them."""
        with _taken.lock:
            size = self._library.take(byref(self.data), _taken.bytes, _taken.newlines, byref(_taken.count))
            return bytes(memoryview(_taken.bytes)[:size]), _taken.newlines[: _taken.count.value]
