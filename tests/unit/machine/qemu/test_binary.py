"""Finding QEMU, with programs that pretend to be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncvmm.errors import QemuUnavailable
from asyncvmm.machine.qemu.binary import OVERRIDE, find_qemu, parse_version


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv(OVERRIDE, str(path))
    return path


def test_a_version_is_read_out_of_its_line() -> None:
    assert parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright") == (7, 2, 22)
    assert parse_version("QEMU emulator version 10.0\n") == (10, 0)
    assert parse_version("hello") is None


def test_the_environment_names_the_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pretend(tmp_path, monkeypatch, "echo QEMU emulator version 8.1.0")
    qemu = find_qemu()
    assert (qemu.path, qemu.version, qemu.sandbox) == (path, (8, 1, 0), True)


def test_a_qemu_without_seccomp_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, '[ "$1" = -sandbox ] && exit 1; echo QEMU emulator version 8.1.0')
    assert find_qemu().sandbox is False


def test_one_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "echo QEMU emulator version 5.2.0")
    with pytest.raises(QemuUnavailable, match=r"expected 6.0 or newer, found 5\.2\.0"):
        find_qemu()


@pytest.mark.parametrize("script", ["exit 3", "echo what", "kill -SEGV $$"])
def test_a_broken_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    pretend(tmp_path, monkeypatch, script)
    with pytest.raises(QemuUnavailable, match="expected its version"):
        find_qemu()


def test_none_at_all_is_said_with_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuUnavailable, match="on PATH"):
        find_qemu()
