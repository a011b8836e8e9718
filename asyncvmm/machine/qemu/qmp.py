"""QMP, QEMU's control protocol, as a sans-I/O client: bytes in, messages out. docs/interop/qmp-spec of QEMU.

Why not the ``qemu.qmp`` package: it needs to own the conversation from the greeting on, a round trip at a time and in
tasks of its own. Here negotiation and ``cont`` are written into the socket before QEMU is started (``opening``), so
that events are on before the guest's first instruction, at no cost; and when QEMU has died, what it said last is read
out of the socket at once, so that the reason of a stop is known when the stop is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import orjson

from asyncvmm.errors import MachineError

MAX_LINE = 1 << 20
"""Longest message accepted, bytes. QEMU's own are below 64 KiB for the commands used here."""


@attrs.frozen
class QmpGreeting:
    """QEMU is there; ``version`` is its major, minor, micro."""

    version: tuple[int, int, int]


@attrs.frozen
class QmpEvent:
    """Something happened: ``name`` as in QEMU's schema, ``data`` its members.

    ``realtime_ns``: QEMU's CLOCK_REALTIME then, in whole microseconds; None where it does not say.
    """

    name: str
    data: Mapping[str, Any]
    realtime_ns: int | None = None


@attrs.frozen
class QmpReply:
    """The answer to the command ``id`` (None where QEMU could not tell which): ``value``, or ``error``'s text."""

    id: int | str | None
    value: Any = None
    error: str | None = None


QmpMessage = QmpGreeting | QmpEvent | QmpReply


def encode_command(name: str, id_: int | str, arguments: Mapping[str, Any] | None = None) -> bytes:
    """One command as QEMU reads it."""
    command: dict[str, Any] = {"execute": name, "id": id_}
    if arguments:
        command["arguments"] = dict(arguments)
    return orjson.dumps(command) + b"\n"


NEGOTIATE_ID = "negotiate"
RUN_ID = "run"


def opening(before_running: bytes = b"", *, run: bool = True) -> bytes:
    """What is written before QEMU exists (it is started with ``-S``).

    Turn events on, carry out the encoded commands ``before_running``, then let the vCPUs ``run``.
    """
    cont = encode_command("cont", RUN_ID) if run else b""
    return encode_command("qmp_capabilities", NEGOTIATE_ID) + before_running + cont


class QmpDecoder:
    """Cuts QEMU's bytes into messages."""

    def __init__(self) -> None:
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[QmpMessage]:
        """The messages that ``data`` completes. Raises MachineError for what is not QMP."""
        self._partial += data
        *lines, rest = self._partial.split(b"\n")
        if len(rest) > MAX_LINE or any(len(line) > MAX_LINE for line in lines):
            raise MachineError("QMP message", expected=f"at most {MAX_LINE} bytes", found="more")
        self._partial = rest
        return [message for line in lines if line.strip() and (message := _parse(bytes(line))) is not None]


def _parse(line: bytes) -> QmpMessage | None:
    try:
        record = dict(orjson.loads(line).items())
        id_ = record.get("id") if isinstance(record.get("id"), int | str) else None
        if "event" in record:
            return QmpEvent(str(record["event"]), dict(record.get("data", {})), _realtime_ns(record.get("timestamp")))
        if "QMP" in record:
            version = record["QMP"]["version"]["qemu"]
            return QmpGreeting((int(version["major"]), int(version["minor"]), int(version["micro"])))
        if "error" in record:
            return QmpReply(id_, error=str(record["error"].get("desc", record["error"])))
        return QmpReply(id_, record["return"]) if "return" in record else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MachineError("QMP message", expected="a QMP object", found=repr(line[:80])) from error


def _realtime_ns(timestamp: Mapping[str, int] | None) -> int | None:
    if timestamp is None or timestamp["seconds"] < 0:
        return None
    return (int(timestamp["seconds"]) * 1_000_000 + int(timestamp["microseconds"])) * 1000
