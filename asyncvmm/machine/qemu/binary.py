"""Finding QEMU on this host, and asking it what it is."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

from asyncvmm.errors import QemuUnavailable
from asyncvmm.machine.qemu.command import SANDBOX, QemuBinary

NAME = "qemu-system-x86_64"
OVERRIDE = "ASYNCVMM_QEMU"
"""Environment variable that names the binary to use, a path or a name on PATH."""

OLDEST = (6, 0)
"""The first release whose microvm has ACPI, hence a power button and power-off."""

TIMEOUT_S = 20.0
"""Longest wait for ``-version``; it takes some 20 ms."""

_CPU_LINE = re.compile(r"^([\w ]+?)\s*: (.*)$", re.MULTILINE)
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")


def find_qemu() -> QemuBinary:
    """The QEMU to use: ``$ASYNCVMM_QEMU``, else qemu-system-x86_64 on PATH.

    Blocks for the time of a process start the first time (per binary). Raises QemuUnavailable: none there, too old,
    or not able to say its version.
    """
    wanted = os.environ.get(OVERRIDE) or NAME
    found = shutil.which(wanted)
    if found is None:
        raise QemuUnavailable("QEMU", expected=f"{NAME} on PATH, or its path in ${OVERRIDE}", found=f"no {wanted}")
    status = os.stat(found)
    return _probe(found, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _probe(path: str, _mtime_ns: int, _size: int) -> QemuBinary:
    text = _ask(path, "-sandbox", SANDBOX, "-version")
    sandbox = text is not None
    if text is None:
        text = _ask(path, "-version")
    version = parse_version(text or "")
    if version is None:
        raise QemuUnavailable(f"QEMU at {path}", expected="its version", found=repr((text or "").strip()[:200]))
    if version < OLDEST:
        raise QemuUnavailable(f"QEMU at {path}", expected="6.0 or newer", found=".".join(map(str, version)))
    return QemuBinary(Path(path), version, sandbox, _host_cpu())


def _host_cpu() -> str:
    """Model and a checksum of the features, of the first processor in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = dict(_CPU_LINE.findall(text.split("\n\n", 1)[0]))
    return f"{found.get('model name', '')} {zlib.crc32(found.get('flags', '').encode()):08x}"


def parse_version(text: str) -> tuple[int, ...] | None:
    """The numbers in QEMU's ``-version`` output, None if there are none."""
    match = _VERSION.search(text)
    return tuple(int(part) for part in match[1].split(".")) if match else None


def _ask(path: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
