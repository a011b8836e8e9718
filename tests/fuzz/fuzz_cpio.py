"""Archives in cpio's new ASCII format: any bytes, or headers whose fields are nearly right."""

from __future__ import annotations

from asyncvmm.guest import cpio
from tests.fuzz.script import Script

MOST_ENTRIES = 16
_FIELDS = 13
_ODD = (b"-0000010", b"+0000001", b"0x000001", b"0000_001", b" 0000001", b"FFFFFFFF", b"0000006e", b"-000007C")


def run(data: bytes) -> None:
    """What can be read can be written and read again."""
    script = Script(data)
    archive = _archive(script) if script.flag() else script.data(len(data))
    try:
        entries = cpio.read(archive, max_entries=MOST_ENTRIES)
    except cpio.CpioError:
        return
    assert len(entries) <= MOST_ENTRIES
    assert sum(len(entry.data) for entry in entries) <= len(archive), "more came out than was there"


def _archive(script: Script) -> bytes:
    archive = b""
    while not script.ended and len(archive) < 8192:
        name = script.pick((b"a", b"a/b", b"TRAILER!!!", script.data(script.byte()))) + b"\0"
        content = script.data(script.byte() % 32)
        fields = [
            b"%08X" % field for field in (1, script.number(2), 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        ]
        if script.byte() % 4 == 0:
            fields[script.byte() % _FIELDS] = script.pick(_ODD)
        archive += cpio.MAGIC + b"".join(fields) + name
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return archive
