"""Why a guest on QEMU stopped: from what QMP said, and from how the child ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncvmm.effects import StopReason

_SHUTDOWN: Mapping[str, StopReason] = {
    "guest-shutdown": "shutdown",
    "guest-reset": "reset",
    "subsystem-reset": "reset",
    "guest-panic": "panic",
}

_HALTED: Mapping[str, StopReason] = {
    "internal-error": "emulation-failure",
    "guest-panicked": "panic",
    "io-error": "machine",
    "watchdog": "machine",
    "shutdown": "shutdown",
}

_CONTENTION = (
    "cannot allocate memory",
    "cannot set up guest memory",
    "resource temporarily unavailable",
    "device or resource busy",
    "too many open files in system",
)


def reason_of_shutdown(event: Mapping[str, Any]) -> StopReason:
    """The reason in a SHUTDOWN event's data; ``machine`` where it was not the guest's doing."""
    return _SHUTDOWN.get(str(event.get("reason")), "machine")


def reason_of_halt(status: Mapping[str, Any]) -> StopReason | None:
    """Why the vCPUs stand still, from query-status; None if they run, or were merely paused."""
    return _HALTED.get(str(status.get("status")))


def debug_exit_code(status: int, last_words: str) -> int | None:
    """The byte written to the debug-exit port, of which QEMU keeps seven bits; None if it was not that.

    QEMU's own failures are exit status 1 and say why.
    """
    return None if status < 0 or status % 2 == 0 or last_words else status >> 1


def is_contention(status: int, last_words: str) -> bool:
    """Whether a start that failed so may succeed a moment later: out of memory, killed for it, or busy."""
    words = last_words.lower()
    return status == -9 or any(sign in words for sign in _CONTENTION)
