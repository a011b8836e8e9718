"""Commands that a signal ends: their exit code says which, and they leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncvmm.interrupts import Ended, ending_signals, exit_code_of

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
PATIENCE_S = 30


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_image_build_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    scratch, tools, begun = tmp_path / "scratch", tmp_path / "tools", tmp_path / "begun"
    for directory in (scratch, tools):
        directory.mkdir()
    for name in ("apt-get", "apt-cache"):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\ntouch {begun}\nexec sleep 1000\n")
        tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:/usr/bin:/bin", "TMPDIR": str(scratch), "ASYNCVMM_HOME": str(tmp_path)}
    process = subprocess.Popen([ASYNCVMM, "image", "build", "--name", "x"], env=env, stderr=subprocess.PIPE)
    until(begun.exists)
    assert list(scratch.iterdir())
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert not list(scratch.iterdir())


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_do_what_they_did_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt) as caught, ending_signals():
        signal.raise_signal(signal.SIGTERM)
    assert exit_code_of(caught.value) == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_on_another_thread_nothing_is_changed() -> None:
    found = []

    def look() -> None:
        with ending_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_ctrl_c_keeps_its_exit_code() -> None:
    assert [exit_code_of(KeyboardInterrupt()), exit_code_of(Ended(signal.SIGHUP))] == [130, 129]
