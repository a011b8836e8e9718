"""Effects: what a machine tells the loop. Plain records, in the order in which the guest caused them.

A register access is answered on the vCPU thread; what it causes beyond its device is one of these (design: data flow,
rule 2). They are the whole vocabulary from a machine up to the VM, the same for every backend, so that a machine may
as well live in another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

Port = Literal["console", "control"]
"""``console`` is COM1 (0x3f8), ``control`` is COM2 (0x2f8): the guest contract's two serial lines."""

StopReason = Literal[
    "shutdown",
    "reset",
    "debug-exit",
    "triple-fault",
    "emulation-failure",
    "entry-failure",
    "machine",
    "panic",
    "init-error",
]


@attrs.frozen
class SerialOutput:
    """Bytes the guest wrote to a serial port.

    ``newlines`` holds, for each newline in ``data``, CLOCK_MONOTONIC ns of the moment the guest wrote it (on QEMU:
    the moment the bytes were read from its socket). ``lost`` counts bytes dropped after ``data`` because the loop
    did not keep up.
    """

    port: Port
    data: bytes
    newlines: tuple[int, ...] = ()
    lost: int = 0


@attrs.frozen
class Stopped:
    """The guest will not run again, and why. The first one counts.

    ``code`` is the debug-exit port's value; ``last_exit``, ``rip`` and ``instruction`` (the bytes that could not be
    emulated) where the backend knows them; ``detail`` is one line for a person.
    """

    reason: StopReason
    detail: str = ""
    code: int | None = None
    last_exit: str | None = None
    rip: int | None = None
    instruction: bytes = b""
    t_ns: int = 0


Effect = SerialOutput | Stopped


@attrs.frozen
class ExitCount:
    """How often one kind of exit came, and the nanoseconds userspace took to answer: their sum, longest and shortest.

    ``min_ns`` is 0 where it is not measured.
    """

    count: int
    total_ns: int
    max_ns: int
    min_ns: int = 0


@attrs.frozen
class ExitStatistics:
    """Exits to userspace so far. ``by_reason`` keys are KVM exit names (``IO``, ``MMIO``, ``HLT`` …).

    ``by_address`` keys read ``out 0x3f8``, ``in 0x3fd``, ``mmio-read 0xfec00000``, ``mmio-write …``; at most a few
    hundred distinct ones are kept, the rest is counted under ``out other`` and so on.
    """

    by_reason: Mapping[str, ExitCount]
    by_address: Mapping[str, ExitCount]
    unmapped: int = 0

    @property
    def total(self) -> int:
        """All exits to userspace."""
        return sum(entry.count for entry in self.by_reason.values())
