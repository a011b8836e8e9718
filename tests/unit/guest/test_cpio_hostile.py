"""Archive headers that nobody honest writes."""

from __future__ import annotations

import pytest

from asyncvmm.guest import cpio

NAME = b"TRAILER!!!\0"


def archive(**odd: bytes) -> bytes:
    fields = {"mode": b"000081A4", "filesize": b"00000000", "namesize": b"%08X" % len(NAME)} | odd
    header = [b"00000001", fields["mode"], *[b"00000000"] * 4, fields["filesize"]]
    header += [*[b"00000000"] * 4, fields["namesize"], b"00000000"]
    return cpio.MAGIC + b"".join(header) + NAME + bytes(3)


def test_the_honest_one_is_read() -> None:
    assert cpio.read(archive()) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", [b"-000007C", b"+0000001", b"0x000001", b"0000_001", b"       0", b"0000000\n"])
@pytest.mark.parametrize("name", ["mode", "filesize", "namesize"])
def test_a_field_of_anything_but_eight_hex_digits_is_refused(name: str, field: bytes) -> None:
    with pytest.raises(cpio.CpioError, match="not hexadecimal"):
        cpio.read(archive(**{name: field}))
