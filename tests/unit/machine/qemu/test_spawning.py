"""Programs that are started beside the event loop: what they inherit, what becomes of them, and what if they cannot."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

import anyio.to_thread
import pytest

from asyncvmm.machine.qemu.spawning import Spawned, _thread, spawn, spawn_blocking
from tests.support.cancelling import cancel_work
from tests.support.holdings import children, is_running
from tests.support.qemu_machine import PATIENCE_S, descriptors, holdings

SLEEP = ("/bin/sh", "-c", "exec sleep 1000")


def said(script: str, descriptors: Sequence[int] = ()) -> str:
    """What a shell script says on its standard error."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as output:
        try:
            spawned = spawn_blocking(["/bin/sh", "-c", script], descriptors, writer)
        finally:
            os.close(writer)
        os.close(spawned.pidfd)
        text = output.read()
    assert spawned.process.wait() == 0
    return text


def test_a_program_has_the_descriptors_it_is_given_and_no_others() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        unasked = os.dup(ours.fileno())
        try:
            os.set_inheritable(unasked, True)
            found = set(said("ls /proc/$$/fd >&2; true", [theirs.fileno()]).split())
        finally:
            os.close(unasked)
        assert {"0", "1", "2", str(theirs.fileno())} <= found
        assert not {str(ours.fileno()), str(unasked)} & found


def test_a_descriptor_that_a_program_is_given_stays_as_it_is_with_us() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said("true", [theirs.fileno()])
        assert not os.get_inheritable(theirs.fileno())


def test_a_programs_input_and_output_are_nothing() -> None:
    assert said("exec 3>&1; readlink /proc/$$/fd/0 /proc/$$/fd/3 >&2; true").split() == ["/dev/null", "/dev/null"]


def test_a_program_has_a_session_of_its_own() -> None:
    pid, session = said("cut -d' ' -f1,6 /proc/$$/stat >&2").split()
    assert pid == session


def test_a_program_has_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "a value")
    assert said('echo "$OF_THE_TEST" >&2') == "a value\n"


def test_no_signal_is_ignored_in_a_program_that_python_ignores() -> None:
    _, mask = said("grep SigIgn /proc/self/status >&2").split()
    assert not int(mask, 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_a_program_that_is_not_there_is_an_error_and_leaves_nothing() -> None:
    before = (children(os.getpid()), descriptors())
    with pytest.raises(FileNotFoundError, match="no such program"):
        spawn_blocking(["/no such program"], (), 2)
    assert (children(os.getpid()), descriptors()) == before


@pytest.mark.anyio
async def test_a_start_that_is_cancelled_leaves_no_program() -> None:
    before = holdings()
    for turns in range(6):
        await cancel_work(turns, spawn(SLEEP, (), 2))
    assert not holdings() - before


@pytest.mark.requires("setpriv")
def test_a_program_lives_on_although_the_loop_that_had_it_started_has_ended_and_its_thread_too() -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    command = [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", "echo up >&2; exec sleep 1000"]
    reader, writer = os.pipe()
    started: list[Spawned] = []

    async def start() -> None:
        started.append(await spawn(command, (), writer))
        os.close(writer)
        assert await anyio.to_thread.run_sync(os.read, reader, 8) == b"up\n"

    thread = threading.Thread(target=lambda: asyncio.run(start()))
    thread.start()
    thread.join()
    try:
        ended, _, _ = select.select([started[0].pidfd], [], [], 0.2)
        assert not ended
    finally:
        os.close(reader)
        started[0].discard()
    assert not is_running(started[0].process.pid)


def test_a_process_that_was_forked_starts_programs_by_a_thread_of_its_own() -> None:
    script = (
        "import asyncio, os\n"
        "from asyncvmm.machine.qemu.spawning import spawn\n"
        "def status(): return asyncio.run(spawn(['/bin/sh', '-c', 'exit 7'], (), 2)).process.wait()\n"
        "assert status() == 7\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(status())\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S)


def test_a_start_that_nobody_waits_for_any_more_leaves_the_thread_to_others() -> None:
    busy, begun = threading.Event(), threading.Event()

    def keep_busy() -> None:
        begun.set()
        busy.wait(PATIENCE_S)

    kept = _thread().call(keep_busy)
    assert begun.wait(PATIENCE_S)
    forgotten = _thread().call(lambda: None)
    assert not kept.cancel()  # it is under way
    assert forgotten.cancel()
    busy.set()
    assert _thread().call(lambda: "goes on").result(PATIENCE_S) == "goes on"
