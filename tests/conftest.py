"""Fixtures for every layer of the suite: the event loops, the toy guest, and what must not be left behind.

Three rules hold for every test: code of the package that keeps the loop from going on for more than 50 ms fails it
(unless it is marked ``stalls``), a skip must name a need of tests/support/requirements.py that this machine really does
not meet, and every event line that is made in this process keeps to the schema.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.holdings import Holdings
from tests.support.lines import Emitted, noted
from tests.support.requirements import objection_to, require
from tests.support.stalls import LONGEST_STALL_S, Bystander, StallWatch, install

GUESTS = Path(__file__).parent / "guests"
LOOPS = {"asyncio": {"use_uvloop": False}, "uvloop": {"use_uvloop": True}}
if os.environ.get("ASYNCVMM_LAB") == "1":  # the lab's KVM is what differs there, and time is short: one loop will do
    del LOOPS["asyncio"]


def pytest_configure(config: pytest.Config) -> None:
    """Say what our markers mean."""
    config.addinivalue_line("markers", "requires(*needs): skipped where one is lacking (support/requirements.py)")
    config.addinivalue_line("markers", "stalls: this test blocks the loop on purpose, or lets others do so")


# How long an example takes is the machine's to say: a deadline would fail what waits for its turn.
settings.register_profile("asyncvmm", deadline=None)
settings.load_profile("asyncvmm")


# -- event loops -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(LOOPS.items()), ids=list(LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Each test marked ``anyio`` runs on both event loops."""
    return "asyncio", request.param[1]


@pytest.fixture(scope="session")
def bystander() -> Bystander:
    """The thread that knows whether everything is late, or the loop alone."""
    return install()


@pytest.fixture
async def stall_watch(bystander: Bystander) -> AsyncIterator[None]:
    """Fails the test if the loop stands still."""
    async with StallWatch(bystander) as watch:
        yield
    if watch.worst is not None and watch.worst.seconds > LONGEST_STALL_S:
        pytest.fail(f"the loop stood still for {watch.worst.seconds * 1000:.0f} ms:\n{watch.worst.stack}")


@pytest.fixture(autouse=True)
def no_stalls(request: pytest.FixtureRequest, valid_lines: None) -> None:
    """Every test marked ``anyio`` has its loop watched, but not while its lines are looked at."""
    if "anyio_backend" in request.fixturenames and not request.node.get_closest_marker("stalls"):
        request.getfixturevalue("stall_watch")


# -- what a test needs, and what it may be skipped for -----------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the test where a need of its ``requires`` marks is not met, before any fixture is made."""
    for mark in item.iter_markers("requires"):
        for need in mark.args:
            require(need)


_skips: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each skip."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note each skip of a whole module."""
    if report.skipped:
        _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    objection = objection_to(reason)
    if objection is not None:
        _skips[report.nodeid] = f"{reason}: {objection}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which a test was skipped without need."""
    if _skips and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which."""
    if _skips:
        terminalreporter.section("skipped without need: this fails the run", red=True)
        for test, why in _skips.items():
            terminalreporter.line(f"{test}: {why}", red=True)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def emitted() -> Iterator[Emitted]:
    """The event lines that are made here."""
    with noted() as lines:
        yield lines


@pytest.fixture(autouse=True)
def valid_lines(emitted: Emitted) -> Iterator[None]:
    """Fails the test if it made an event line that the schema refuses, or a fixture did that was made for it."""
    yield
    problems = emitted.problems()
    if problems:
        pytest.fail("event lines that the schema refuses:\n" + "\n".join(problems))


# -- what must not be left behind --------------------------------------------------------------------------------------


@pytest.fixture
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TMPDIR, this test's own."""
    directory = tmp_path / "TMPDIR"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    return directory


@pytest.fixture
def holdings(temporary_directory: Path) -> Callable[..., Holdings]:
    """Counts what this process holds now."""
    return Holdings.now


# -- guests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy guest (guests/toy.S), an ELF with a PVH note."""
    require("gcc")
    compiler = shutil.which("gcc")
    assert compiler is not None
    target = tmp_path_factory.mktemp("guests") / "toy.elf"
    flags = ["-m64", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", f"-Wl,-T,{GUESTS / 'toy.ld'}"]
    subprocess.run([compiler, *flags, "-o", target, GUESTS / "toy.S"], check=True, timeout=60)
    return target
