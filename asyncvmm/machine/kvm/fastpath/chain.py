"""Chains of system calls: written down once, made as often as wanted, with no Python between the calls.

    chain = Chain()
    with chain.phase("kvm_open"):
        kvm = chain.open("/dev/kvm", path)
        chain.ioctl(Request.KVM_CHECK_EXTENSION, kvm, capability, least=1)
    program = chain.program()

    made = program.run()
    timeline.record_later(made.spans)
    if made.failure is not None: ...

An argument is a number or an ``At``: an earlier step's result, and what is added to it. ``chain.c`` makes the steps in
one go, the GIL released; where the library cannot be loaded ``interpret`` makes the same steps, of the same bytes. Both
stop at the first result that is less than the step's ``least``, and repeat a call that a signal interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from pathlib import Path

import attrs

from asyncvmm.machine.kvm.fastpath.binding import load
from asyncvmm.timing.timeline import Span

ARGUMENTS = 6
STEP = struct.Struct(f"<hH{ARGUMENTS}H{ARGUMENTS}Qq")
"""struct step of chain.c: the call, whether its time is wanted, a base for each argument, the arguments, and the least
good result."""
NOTHING = 0xFFFF
COPY, STORE = -1, -2
MOST_STEPS = NOTHING - 256
_WORD_BITS = (1 << 64) - 1
_SLOT_WORDS = 2
_DATA_SLOT = 0
BEGAN = 1
"""The word of the slots that says when the run began, CLOCK_MONOTONIC ns."""
_ANY_RESULT = -1 << 63
_NO_RESULT = -1
"""Of a step that was not made: nothing that could be undone."""

Executor = Callable[[bytes, int, int, int], int]
"""Makes steps: their bytes, how many they are, the slots' address, how many of those are given before the first step's.
Returns how many steps did not fail."""


class SystemCall(IntEnum):
    """System call numbers of x86-64."""

    OPEN = 2
    CLOSE = 3
    MMAP = 9
    MUNMAP = 11
    IOCTL = 16
    PREAD64 = 17
    MADVISE = 28


@attrs.frozen
class At:
    """The value of a slot, ``offset`` added."""

    slot: int
    offset: int = 0

    def __add__(self, offset: int) -> At:
        return At(self.slot, self.offset + offset)


Argument = int | At


@attrs.frozen
class Failure:
    """A step that failed: its name, and its result, -errno or less than it was to be."""

    name: str
    result: int

    @property
    def errno(self) -> int:
        """The error number, 0 for a result that was only too small."""
        return max(-self.result, 0)


@attrs.frozen
class _Span:
    """A phase: steps ``first`` to before ``end``."""

    name: str
    first: int
    end: int
    children: tuple[_Span, ...]


class Chain:
    """Writes a chain down. ``given`` values are not known yet: ``Program.run`` is told them."""

    def __init__(self, given: int = 0) -> None:
        self._first = 1 + given
        self._steps: list[tuple[int, tuple[int, ...]]] = []
        self._timed: set[int] = set()
        self._names: list[str] = []
        self._undo: list[tuple[int, int, tuple[Argument, ...]]] = []
        self._spans: list[_Span] = []
        self._data = bytearray()
        self._kept: list[object] = []
        self._ahead = 0

    def given(self, index: int) -> At:
        """The value that ``run`` will be told at this place."""
        if not 0 <= index < self._first - 1:
            raise ValueError(f"given value {index} of {self._first - 1}")
        return At(1 + index)

    def data(self, content: bytes | ctypes.Structure | ctypes.c_uint64) -> At:
        """The address of bytes that each run has of its own, to be written by it."""
        offset = len(self._data)
        self._data += bytes(content)
        self._data += bytes(-len(self._data) % 8)
        return At(_DATA_SLOT, offset)

    def shared(self, content: ctypes.Structure) -> int:
        """The address of a structure that all runs share; the calls must only read it."""
        self._kept.append(content)
        return ctypes.addressof(content)

    def call(self, name: str, call: int, *arguments: Argument, least: int = 0, may_fail: bool = False) -> At:
        """Append a step and give its result. Raises ValueError for a result that is not known by then.

        may_fail: the chain goes on whatever the result.
        """
        padded = (*arguments, *(0,) * (ARGUMENTS - len(arguments)))
        here = self._first + len(self._steps)
        bases = [argument.slot if isinstance(argument, At) else NOTHING for argument in padded]
        if any(base != NOTHING and not 0 <= base < here for base in bases) or least < 0:
            raise ValueError(f"step {len(self._steps)} ({name}): arguments {arguments}, least {least}")
        if len(self._steps) >= MOST_STEPS:
            raise ValueError(f"more than {MOST_STEPS} steps")
        values = [_word(argument.offset if isinstance(argument, At) else argument) for argument in padded]
        self._steps.append((call, (*bases, *values, _ANY_RESULT if may_fail else least)))
        self._names.append(name)
        return At(here)

    def open(self, name: str, path: Path) -> At:
        """open(2) for reading and writing, closed again by ``undo``."""
        where = self.data(os.fsencode(path) + b"\0")
        return self.closing(self.call(name, SystemCall.OPEN, where, os.O_RDWR | os.O_CLOEXEC))

    def ioctl(
        self,
        request: IntEnum,
        fd: Argument,
        argument: Argument = 0,
        *,
        least: int = 0,
        name: str | None = None,
        may_fail: bool = False,
    ) -> At:
        """ioctl(2), named as its request unless it has another name."""
        name = name or request.name
        return self.call(name, SystemCall.IOCTL, fd, request, argument, least=least, may_fail=may_fail)

    def map(self, name: str, size: Argument, flags: int, fd: Argument = -1) -> At:
        """mmap(2) for reading and writing, unmapped again by ``undo``."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return self.undoing(SystemCall.MUNMAP, self.call(name, SystemCall.MMAP, 0, size, protection, flags, fd), size)

    def copy(self, to: Argument, source: Argument, size: int) -> None:
        """Copy bytes in memory, from where they do not overlap with."""
        self.call("copy", COPY, to, source, size)

    def store(self, to: Argument, value: Argument) -> None:
        """Store a value in memory, 64 bits."""
        self.call("store", STORE, to, value)

    def closing(self, fd: At) -> At:
        """The step just appended gave a descriptor, which ``undo`` closes."""
        return self.undoing(SystemCall.CLOSE, fd)

    def undoing(self, call: int, at: At, *arguments: Argument) -> At:
        """``undo`` makes ``call`` with what the step just appended gave, if it was made."""
        self._undo.append((len(self._steps) - 1, call, (at, *arguments)))
        return at

    def is_ready_ahead(self) -> None:
        """What was appended so far can be made before a run is wanted, any time."""
        self._ahead = len(self._steps)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The steps appended in this block are a phase of that name."""
        first, outer, self._spans = len(self._steps), self._spans, []
        self._timed.add(first - 1)
        yield
        self._timed.add(len(self._steps) - 1)
        outer.append(_Span(name, first, len(self._steps), tuple(self._spans)))
        self._spans = outer

    def program(self) -> Program:
        """What was written down, to be run."""
        results = array("q", (_NO_RESULT, 0)) * len(self._steps)
        template = array("q", bytes(8 * _SLOT_WORDS * self._first)) + results
        return Program(
            steps=b"".join(
                STEP.pack(call, index in self._timed, *rest) for index, (call, rest) in enumerate(self._steps)
            ),
            names=tuple(self._names),
            first=self._first,
            template=template + array("q", bytes(self._data)),
            data_offset=template.itemsize * len(template),
            data_bytes=len(self._data),
            undo=tuple(self._undo),
            spans=tuple(self._spans),
            ahead=self._ahead,
            kept=self._kept,
        )


@attrs.frozen(eq=False, kw_only=True)
class Program:
    """A chain to be run. Made once for VMs of one shape; runs share nothing that is written."""

    steps: bytes
    names: tuple[str, ...]
    first: int
    """The first step's slot: before it are the data's address and the given values."""
    template: array[int]
    """The slots, and the data behind them."""
    data_offset: int
    data_bytes: int
    undo: tuple[tuple[int, int, tuple[Argument, ...]], ...]
    spans: tuple[_Span, ...]
    ahead: int
    """How many of the steps can be made before a run is wanted."""
    kept: list[object]

    def run(self, *given: int, execute: Executor | None = None) -> Made:
        """Make the steps; what they acquire is the caller's to ``undo``, also of a chain that failed half-way."""
        slots = self.lay_out(*given)
        address, _ = slots.buffer_info()
        return Made(self, slots, (execute or executor())(self.steps, len(self.names), address, self.first))

    def made(self, slots: array[int], done: int) -> Made:
        """A run of it that somebody else has made, whose first ``done`` steps did not fail."""
        return Made(self, slots, done)

    def lay_out(self, *given: int) -> array[int]:
        """The slots of a run that begins now."""
        if len(given) != self.given:
            raise ValueError(f"{len(given)} given values, not {self.given}")
        slots = self.template[:]
        address, _ = slots.buffer_info()
        slots[0] = address + self.data_offset
        self.give(slots, 0, given)
        slots[BEGAN] = time.monotonic_ns()
        return slots

    def give(self, slots: array[int], first: int, given: Sequence[int]) -> None:
        """Put these in the places of given values, from the one with this number on."""
        for index, value in enumerate(given, 1 + first):
            slots[_SLOT_WORDS * index] = value

    @property
    def given(self) -> int:
        """How many values a run is given."""
        return self.first - 1


class Made:
    """A chain that was run: its results, its times, and the way back."""

    __slots__ = ("_done", "_program", "_slots", "_undone")

    def __init__(self, program: Program, slots: array[int], done: int) -> None:
        self._program = program
        self._slots = slots
        self._done = done
        self._undone = False

    def __getitem__(self, at: At) -> int:
        """The value at a slot."""
        return self._slots[_SLOT_WORDS * at.slot] + at.offset

    def read(self, at: At, size: int) -> bytes:
        """What this run has in its data."""
        if at.slot != _DATA_SLOT or not 0 <= at.offset <= at.offset + size <= self._program.data_bytes:
            raise ValueError(f"{size} bytes at {at}: not the chain's data")
        return ctypes.string_at(self[at], size)

    @property
    def failure(self) -> Failure | None:
        """The step that failed, None if none did."""
        if self._done == len(self._program.names):
            return None
        return Failure(self._program.names[self._done], self[At(self._program.first + self._done)])

    def ended_ns(self, step: int) -> int:
        """CLOCK_MONOTONIC ns when this step was done; of step -1 when the chain began.

        0 but for the first and last moments of phases, and for a step that failed: time is not asked for in between.
        """
        return self._slots[_SLOT_WORDS * (self._program.first + step) + 1] if step >= 0 else self._slots[BEGAN]

    def count_from_beginning(self, steps: int) -> None:
        """The first ``steps`` were made before the run began, and took none of its time."""
        if steps:
            first = _SLOT_WORDS * self._program.first + 1
            self._slots[first : first + _SLOT_WORDS * steps : _SLOT_WORDS] = (
                array("q", self._slots[BEGAN : BEGAN + 1]) * steps
            )

    def spans(self) -> list[Span]:
        """The chain's phases; of a chain that failed those that had begun."""
        return [span for outer in self._program.spans if (span := self._span(outer)) is not None]

    def _span(self, span: _Span) -> Span | None:
        if span.first > self._done:
            return None
        failed = self._done < span.end
        last = self._done if failed else span.end - 1
        children = tuple(child for inner in span.children if (child := self._span(inner)) is not None)
        return Span(span.name, self.ended_ns(span.first - 1), self.ended_ns(last), children, failed)

    def undo(self) -> None:
        """Give back what the chain acquired, last first. May be called again."""
        if self._undone:
            return
        self._undone = True
        for step, call, arguments in reversed(self._program.undo):
            if step < self._done and self[At(self._program.first + step)] >= 0:
                _libc_syscall(call, *(self[part] if isinstance(part, At) else part for part in arguments))


@cache
def executor() -> Executor:
    """What makes a chain's steps in this process: the library, or ``interpret`` where there is none."""
    return native() or interpret


def native() -> Executor | None:
    """The library's executor, one call for all steps; None where there is no library."""
    library = load()
    return None if library is None else library.chain


_Slots = ctypes.Array[ctypes.c_int64]


def interpret(steps: bytes, count: int, address: int, given: int) -> int:
    """Make the steps one by one."""
    slots = (ctypes.c_int64 * (_SLOT_WORDS * (given + count))).from_address(address)
    for number, (call, timed, *rest) in zip(range(count), STEP.iter_unpack(steps), strict=False):
        here, least = given + number, rest[-1]
        value = _make(call, rest[:ARGUMENTS], rest[ARGUMENTS:-1], slots, here)
        slots[_SLOT_WORDS * here] = value
        if timed or value < least:
            slots[_SLOT_WORDS * here + 1] = time.monotonic_ns()
        if value < least:
            return number
    return count


def _make(call: int, bases: Sequence[int], arguments: Sequence[int], slots: _Slots, known: int) -> int:
    if any(base != NOTHING and base >= known for base in bases):
        return -errno.EINVAL
    values = [
        argument + (0 if base == NOTHING else slots[_SLOT_WORDS * base]) & _WORD_BITS
        for base, argument in zip(bases, arguments, strict=True)
    ]
    if call == COPY:
        ctypes.memmove(*values[:3])
        return 0
    if call == STORE:
        ctypes.c_uint64.from_address(values[0]).value = values[1]
        return 0
    while (result := _libc_syscall(call, *values)) == -errno.EINTR:
        pass
    return result


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * (1 + ARGUMENTS)


def _libc_syscall(call: int, *arguments: int) -> int:
    """A system call with the GIL released; -errno if it fails."""
    result = int(_libc.syscall(call, *arguments, *(0,) * (ARGUMENTS - len(arguments))))
    return -ctypes.get_errno() if result == -1 else result


def _word(value: int) -> int:
    if not -(1 << 63) <= value <= _WORD_BITS:
        raise ValueError(f"{value:#x} does not fit 64 bits")
    return value & _WORD_BITS
