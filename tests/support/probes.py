"""Programs of a few bytes that try, in a guest, what a workload must not be able to do."""

from __future__ import annotations

import struct

_CODE = {
    # ioperm(0x2f8, 8, 1); exit(errno)
    "ioperm": "b8ad000000 bff8020000 be08000000 ba01000000 0f05 f7d8 89c7 b83c000000 0f05",
    # outb('X', 0x2f8); exit(0)
    "outb": "baf8020000 b058 ee 31ff b83c000000 0f05",
    # ptrace(PTRACE_ATTACH, 1, 0, 0); exit(errno)
    "attach": "b865000000 bf10000000 be01000000 31d2 4531d2 0f05 f7d8 89c7 b83c000000 0f05",
    # ioctl(1, TIOCGSERIAL, &s); s.port = 0x2f8; ioctl(1, TIOCSSERIAL, &s); exit(errno)
    "serial": "b810000000 bf01000000 be1e540000 488d942400ffffff 0f05 c74208f8020000 b810000000 be1f540000 0f05"
    " f7d8 89c7 b83c000000 0f05",
}


def probe_programs() -> dict[str, bytes]:
    """Static x86-64 programs by name; the exit code is the errno, or nothing of the kind where one dies of a signal."""
    return {name: _program(code) for name, code in _CODE.items()}


def _program(code: str) -> bytes:
    """A static x86-64 program of this machine code: one segment, loaded at 4 MiB."""
    body = bytes.fromhex(code)
    size, base = 120 + len(body), 0x400000
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + body
